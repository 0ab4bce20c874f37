"""`latentdiff edit` as a user calls it; inference/edit.py is the same main()."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageOps

from latentdiff.cli.edit import KINDS, TASKS, main, parse
from latentdiff.pipelines.restore import Kind
from tests.random_models import make_pipeline

Edit = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def edit(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """The pixels of what a command line makes, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(task: str, *words: str, output: str = "out.png") -> np.ndarray:
        fast = ("--model", model, "--steps", "2", "--seed", "5", "--quiet", "-o", output)
        assert main([task, *words, *fast]) == 0
        return np.asarray(Image.open(output))

    return run


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def box(size: tuple[int, int], *where: int, value: int = 255) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(value, where)
    return mask


@pytest.mark.parametrize(("size", "blur"), [((64, 64), 0), ((65, 50), 0), ((100, 61), 3)])
def test_the_size_stays_and_all_outside_the_mask(
    size: tuple[int, int], blur: int, edit: Edit
) -> None:
    noise(size).save("a.png")
    box(size, 20, 20, 36, 36).save("m.png")
    before = np.asarray(noise(size))
    for words in (("a.png",), ("out.png",)):  # once more, over the result
        after = edit("inpaint", *words, "a cat", "--mask", "m.png", "--mask-blur", str(blur))
        assert after.shape == before.shape
        rows, columns = np.nonzero((after != before).any(-1))
        assert min(rows.min(), columns.min()) >= 20 - 3 * blur
        assert max(rows.max(), columns.max()) < 36 + 3 * blur


@pytest.mark.parametrize("alpha", [255, 128])
def test_masks_with_opacity_and_of_half_the_size(alpha: int, edit: Edit) -> None:
    noise((96, 64)).save("a.png")
    box((96, 64), 16, 16, 40, 40, value=alpha).save("grey.png")
    box((48, 32), 8, 8, 20, 20, value=alpha).save("half.png")
    clear = Image.new("RGBA", (96, 64), (255, 255, 255, 0))
    clear.paste((255, 255, 255, alpha), (16, 16, 40, 40))
    clear.save("clear.png")
    grey, *others = (
        edit("inpaint", "a.png", "a cat", "--mask", f"{name}.png")
        for name in ("grey", "half", "clear")
    )
    assert all((other == grey).all() for other in others)
    assert (grey != np.asarray(noise((96, 64)))).any()


def test_the_padding_of_the_masked_area(edit: Edit) -> None:
    noise((64, 64)).save("a.png")
    box((64, 64), 0, 56, 8, 64).save("m.png")
    first, second = (
        edit("inpaint", "a.png", "a cat", "--mask", "m.png", "--padding-mask-crop", n)
        for n in ("0", "32")
    )
    assert (first != second).any()


def test_strength(edit: Edit, capsys: pytest.CaptureFixture[str]) -> None:
    noise((30, 20)).save("a.png")
    kept = edit("image_to_image", "a.png", "a cat", "--strength", "0")
    assert (kept == np.asarray(noise((30, 20)))).all() and "0 steps" in capsys.readouterr().err
    edit("image_to_image", "a.png", "a cat", "--strength", "0.8", "--steps", "1")
    assert "seed 5, 1 steps" in capsys.readouterr().err
    for colour in ("black", "white"):
        Image.new("RGB", (30, 20), colour).save(f"{colour}.png")
    black, white = (
        edit("image_to_image", f"{colour}.png", "a cat", "--strength", "1")
        for colour in ("black", "white")
    )
    assert (black == white).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_photo(orientation: int, edit: Edit) -> None:
    stored = Image.new("RGB", (40, 20), "blue")
    stored.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save("a.jpg", exif=exif, quality=95)
    found = edit("image_to_image", "a.jpg", "--strength", "0")
    assert (found == np.asarray(ImageOps.exif_transpose(Image.open("a.jpg")))).all()
    assert Image.open("out.png").getexif().get(0x0112, 1) == 1
    mask = box((found.shape[1], found.shape[0]), 0, 0, 8, 8)
    mask.save("m.png")
    painted = edit("inpaint", "a.jpg", "a cat", "--mask", "m.png")
    assert (painted == found)[np.asarray(mask) == 0].all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "I;16", "CMYK"])
def test_a_grey_ramp_of_any_mode(mode: str, edit: Edit) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
    image = Image.fromarray(ramp.astype(np.uint16) * 257 if mode == "I;16" else ramp)
    image = image if mode == "I;16" else image.convert(mode)
    name = "a.jpg" if mode == "CMYK" else "a.png"
    image.save(name, **({"quality": 100} if mode == "CMYK" else {}))
    found = edit("image_to_image", name, "--strength", "0")[..., :3].astype(int)
    if mode == "1":
        assert set(np.unique(found)) == {0, 255}
    else:
        assert np.abs(found - ramp[..., None]).max() <= (4 if mode == "CMYK" else 0)


def test_outpaint_variations_and_grids(edit: Edit) -> None:
    noise((33, 21)).save("a.png")
    larger = edit("outpaint", "a.png", "a cat", "--left", "5", "--bottom", "12")
    assert larger.shape == (33, 38, 3)
    assert (larger[:21, 5:] == np.asarray(noise((33, 21)))).all()
    assert edit("variations", "a.png", output="v.png").shape == (2 * 23 - 2, 2 * 35 - 2, 3)
    edit("image_to_image", "a.png", "a cat", "dog", "--num-images", "2", "--separate")
    assert sorted(p.name for p in Path().glob("out-*.png")) == [
        f"out-{k:03d}.png" for k in range(4)
    ]


def test_interpolation_is_a_strip_or_a_gif(model: str, edit: Edit) -> None:
    words = ("a cat", "dog", "--frames", "3", "--size", "16x20")
    assert edit("interpolate", *words).shape == (16, 3 * 22 - 2, 3)
    edit("interpolate", *words, output="out.gif")
    with Image.open("out.gif") as animation:
        assert animation.n_frames == 3 and animation.size == (20, 16)  # type: ignore[attr-defined]
    seeds = ("a cat", "--seeds", "1,2", "--frames", "2", "--model", model, "--steps", "1")
    assert main(["interpolate", *seeds, "-o", "seeds.png", "--quiet"]) == 0
    assert Image.open("seeds.png").size == (66, 32)


def test_replay_takes_the_texts_that_were_drawn(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.txt").write_text("cat\ndog\npain\n")
    words = ("a __w__", "{dog|cat} __w__", "--negative", "__w__", "--wildcards", ".")
    fast = ("--frames", "3", "--steps", "2", "--seed", "5", "--separate", "-o", "out.png")
    assert main(["interpolate", *words, *fast, "--model", model, "--quiet"]) == 0
    for file in ("out-000.png", "out-002.png"):
        assert main(["--quiet", f"--replay={file}", "-o", "again.png"]) == 0
        assert f"{file}: the same image, bit for bit" in capsys.readouterr().err
    other = ("--replay", "out-002.png", "--frames", "2", "-o", "again.png", "--separate")
    assert main([*other, "--quiet"]) == 0
    assert sorted(file.name for file in Path().glob("again-*")) == [
        "again-000.png",
        "again-001.png",
    ]


def test_a_style_without_a_prompt(
    model: str, edit: Edit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "styles.csv").write_text("name,prompt,negative_prompt\nink,ink {prompt},dog\n")
    noise((32, 32)).save("a.png")
    styled = edit("variations", "a.png", "--style", "ink")
    assert (styled == edit("variations", "a.png", "ink ", "--negative", "dog")).all()
    assert (styled != edit("variations", "a.png")).any()
    assert main(["variations", "a.png", "--style", "inc", "--model", model]) == 2
    assert "Did you mean 'ink'" in capsys.readouterr().err
    assert main(["--replay", "out.png", "--style", "ink", "-o", "again.png"]) == 2
    assert "--style beside --replay needs a PROMPT" in capsys.readouterr().err


def test_replay_makes_an_edited_image_again(model: str, edit: Edit) -> None:
    noise((33, 21)).save("a.png")
    box((33, 21), 0, 0, 9, 9).save("m.png")
    first = edit("inpaint", "a.png", "a cat", "--mask", "m.png", "--strength", "0.9")
    assert main(["--replay", "out.png", "-o", "again.png", "--quiet"]) == 0
    assert (np.asarray(Image.open("again.png")) == first).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inpaint", "no.png", "--mask", "m.png"), "no.png: the file does not exist"),
        (("inpaint", "a.png", "--mask", "no.png"), "mask_image cannot be read: no.png"),
        (("inpaint", "text.png", "--mask", "m.png"), "text.png: not an image"),
        (("inpaint", "moving.gif", "--mask", "m.png"), "has 2 frames"),
        (("inpaint", "a.png", "--mask", "m.png", "-o", "x.psd"), "cannot be written in PSD"),
        (("inpaint", "a.png", "--mask", "m.png", "--model", "./no"), "does not exist"),
        (("outpaint", "a.png", "--left", "8", "--columns", "0"), "--columns must be at least 1"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentdiff.formats.model.load_model", None)
    write_inputs()
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inpaint", "a.png"), "needs mask_image"),
        (("inpaint", "a.png", "--mask", "wide.png"), "got 50x50"),
        (("inpaint", "a.png", "--mask", "black.png"), "nothing to paint"),
        (("inpaint", "a.png", "--mask", "m.png", "--strength", "-1"), "strength must be"),
        (("inpaint", "a.png", "--mask", "m.png", "--mask-blur", "-1"), "mask_blur must be"),
        (("outpaint", "a.png"), "at least one of left"),
        (("outpaint", "a.png", "--top", "-4"), "top must be a whole number"),
        (("interpolate", "a cat"), "at least two prompts or two seeds"),
    ],
)
def test_mistakes_end_with_one_line(
    words: tuple[str, ...],
    message: str,
    edit: Edit,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_inputs()
    assert main([*words, "--model", model, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def write_inputs() -> None:
    noise((96, 64)).save("a.png")
    box((96, 64), 0, 0, 9, 9).save("m.png")
    box((50, 50), 0, 0, 9, 9).save("wide.png")
    Image.new("L", (96, 64)).save("black.png")
    Path("text.png").write_text("not an image")
    frames = [Image.new("RGB", (96, 64), colour) for colour in ("red", "blue")]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_a_method_with_the_arguments_of_its_options(task: str) -> None:
    import inspect

    from latentdiff import LatentDiffusionPipeline

    names = inspect.signature(getattr(LatentDiffusionPipeline, task)).parameters
    for flag, told in TASKS[task].options:
        name = told.get("dest", flag.lstrip("-").replace("-", "_"))
        assert name in names or name in ("seed", "size")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("restore", "a.png", "deblur"), "the kind is --kind deblur"),
        (("upscale", "a.png", "4"), "the scale is --scale 4"),
        (("upscale", "a.png", "1.5"), "the scale is --scale 1.5"),
        (("restore", "a.png", "--kind", "jpeg", "--blur", "3"), "--blur is for --kind deblur"),
    ],
)
def test_words_that_would_be_taken_for_something_else(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_measure_says_what_is_restored() -> None:
    assert parse(["restore", "a.png", "--blur", "3"]).kind == "deblur"
    assert parse(["restore", "a.png"]).kind is None
    assert KINDS.keys() == set(get_args(Kind))
