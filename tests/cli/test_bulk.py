"""`latentdiff generate --prompts`: a file's images, whatever is killed and however many run."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentdiff.cli.generate import main
from latentdiff.images import grid
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.pipelines.metadata import read
from tests.random_models import make_pipeline

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from killing import in_fork  # noqa: E402
from launching import launch  # noqa: E402

ROWS = [
    {"prompt": "a cat"},
    {"prompt": "a dog", "size": "16x32", "steps": 3, "negative": "cat"},
    {"prompt": "a __w__ {x|y}", "num_images": 3},
    {"prompt": "a cat", "seed": 70, "num_images": 2, "guidance": 2},
    {"prompt": "a dog", "sampler": "Euler a", "guidance": 1},
]
COUNT = 8
#: (prompt's beginning, seed, size, steps, guidance, sampler) of each image.
EXPECTED = [
    ("a cat", 5, (32, 32), 2, 5, "ddim"),
    ("a dog", 6, (32, 16), 3, 5, "ddim"),
    *(("a ", seed, (32, 32), 2, 5, "ddim") for seed in (7, 8, 9)),
    *(("a cat", seed, (32, 32), 2, 2, "ddim") for seed in (70, 71)),
    ("a dog", 12, (32, 32), 2, 1, "euler_ancestral"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return str(folder)


def words(folder: Path, model: str, *more: Any, output: str = "cat.png") -> list[str]:
    file = folder / "prompts.jsonl"
    if not file.exists():
        file.write_text("\n".join(map(json.dumps, ROWS)))
        (folder / "w.txt").write_text("red\nblue\n")
    given = ["--prompts", file, "--model", model, "--output", folder / "out" / output, "--quiet"]
    return [str(word) for word in [*given, "--steps", 2, "--seed", 5, "--wildcards", folder, *more]]


def files(folder: Path) -> dict[str, int]:
    """When each file was made."""
    return {f.name: f.stat().st_mtime_ns for f in folder.iterdir() if f.name[0] != "."}


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.mark.parametrize("scales", [(3, None, 1.5), (None, 3, None)])
def test_a_row_without_guidance_has_the_models_own(
    scales: tuple[float | None, ...], model: str, tmp_path: Path
) -> None:
    lines = [f"a cat,{'' if scale is None else scale}" for scale in scales]
    file = tmp_path / "prompts.csv"
    file.write_text("\n".join(["prompt,guidance", *lines]))
    output = tmp_path / "cat.png"
    given = ("--prompts", file, "--model", model, "--steps", "1", "--quiet", "--output", output)
    assert main([*map(str, given)]) == 0
    own = LatentDiffusionPipeline.from_pretrained(model).default_guidance
    found = [read(tmp_path / f"cat-{k:05d}.png").settings for k in range(len(scales))]
    assert [one["guidance_scale"] for one in found] == [s or own for s in scales]


NAMES = [f"cat-{k:05d}.png" for k in range(COUNT)]


def test_every_image_is_as_its_row_says_and_equals_the_single_call(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, call = list[int](), LatentDiffusionPipeline.__call__

    def counted(pipeline: Any, prompt: Any, **options: Any) -> Any:
        calls.append(len(prompt))
        return call(pipeline, prompt, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LatentDiffusionPipeline, "__call__", counted)
        sheet = tmp_path / "sheet.png"
        assert main(words(tmp_path, model, "--contact-sheet", sheet, "--batch-size", 4)) == 0
    assert calls == [4, 2, 1, 1]
    assert f"8 images made, 0 were there: {tmp_path}/out/cat-00000.png" in capsys.readouterr().out
    assert sorted(files(tmp_path / "out")) == NAMES
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    images, texts = [], set()
    for name, expected in zip(NAMES, EXPECTED, strict=True):
        file = tmp_path / "out" / name
        found, image = read(file).settings, Image.open(file)
        prompt, seed, size, steps, guidance, sampler = expected
        assert found["prompt"].startswith(prompt) and image.size == size
        names = ("seed", "num_inference_steps", "guidance_scale", "sampler")
        assert [found[name] for name in names] == [seed, steps, guidance, sampler]
        alone = pipeline(
            found["prompt"],
            negative_prompt="cat" if steps == 3 else None,
            seed=seed,
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
            progress=False,
        ).images[0]
        assert np.abs(np.asarray(alone).astype(int) - pixels(file)).max() <= 1
        images.append(image)
        texts.add(found["prompt"])
    assert len(texts) > 3 and texts <= {"a cat", "a dog"} | {
        f"a {a} {b}" for a in ("red", "blue") for b in "xy"
    }
    images[1] = Image.new("RGB", (32, 32), "white")
    images[1].paste(Image.open(tmp_path / "out" / NAMES[1]), (0, 8))
    assert Image.open(sheet).tobytes() == grid(images).tobytes()


def test_processes_share_the_images(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    assert main(words(one, model)) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    sheet = two / "sheet.png"
    for rank in range(2):
        assert not sheet.exists()
        monkeypatch.setenv("RANK", str(rank))
        assert main(words(two, model, "--contact-sheet", sheet)) == 0
        if rank == 0:
            assert sorted(files(two / "out")) == NAMES[::2]
    assert sorted(files(two / "out")) == NAMES and sheet.exists()
    for name in NAMES:
        assert np.abs(pixels(one / "out" / name) - pixels(two / "out" / name)).max() <= 1
        for key in ("prompt", "seed", "request"):
            assert read(one / "out" / name).settings[key] == read(two / "out" / name).settings[key]


def killed(given: list[str], at: int) -> None:
    """Run, and die by SIGKILL as file number `at` takes its place."""
    replace, count = Path.replace, 0

    def dying(file: Path, target: Path) -> Path:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return replace(file, target)

    Path.replace = dying  # type: ignore[method-assign,assignment]
    os._exit(main(given))


def test_what_was_killed_goes_on_where_it_was(model: str, tmp_path: Path) -> None:
    given = words(tmp_path, model, "--batch-size", 2)
    made: dict[str, int] = {}
    for at in (3, 2):  # files are made out of order, since batches are of one size
        assert in_fork(killed, given, at) == -signal.SIGKILL
        now = files(tmp_path / "out") if (tmp_path / "out").exists() else {}
        assert len(now) == len(made) + at and made.items() <= now.items()
        made = now
    assert main(given) == 0
    now = files(tmp_path / "out")
    assert sorted(now) == NAMES and made.items() <= now.items()
    assert main(given) == 0 and files(tmp_path / "out") == now


@pytest.mark.parametrize("output", ["cat.png", "cat.jpg", "cat.webp"])
def test_only_whole_files_of_the_same_settings_are_kept(
    output: str, model: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "w.txt").write_text("red\n")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    given = words(tmp_path, model, output=output)

    def remade(*more: Any) -> set[int]:
        before = files(out)
        assert main([*given, *map(str, more)]) == 0
        return {k for k, (name, at) in enumerate(sorted(files(out).items())) if before[name] != at}

    assert main(given) == 0
    assert remade() == set()
    names = sorted(files(out))
    (out / names[0]).write_bytes((out / names[0]).read_bytes()[:-200])
    Image.new("RGB", (32, 32)).save(out / names[1])
    (out / names[2]).write_bytes((out / names[3]).read_bytes())
    (out / names[7]).write_text("not an image")
    assert remade() == {0, 1, 2, 7}
    assert remade() == set()
    (tmp_path / "w.txt").write_text("blue\n")
    assert remade() == {2, 3, 4}
    prompts.write_text(prompts.read_text().replace('"seed": 70', '"seed": 71'))
    assert remade() == {5, 6}
    assert remade("--steps", 1) == {0, 2, 3, 4, 5, 6, 7}
    other = tmp_path / "other"
    make_pipeline(seed=1).save_pretrained(other)
    assert remade("--steps", 1, "--model", other) == set(range(COUNT))
    moved = other.rename(tmp_path / "moved")
    assert remade("--steps", 1, "--model", moved) == set()


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (
            [{"prompt": "a"}, {"prompt": "b", "size": "33"}, {"prompt": "c", "sampler": "eler"}],
            [],
            ["line 2: ", "line 3: sampler must be one of .*Did you mean 'euler'"],
        ),
        ([{"prompt": "a", "steps": 2000}], [], ["line 1: the number of sampling steps"]),
        ([{"prompt": "a [b:c:0.5]"}], ["--weighted"], ["line 1: "]),
        ([{"prompt": "a __q__"}, {"prompt": "{2$$a|b}"}], [], ["line 1: __q__", "line 2: "]),
        ([{"prompt": "a", "seed": 2**64 - 1, "num_images": 2}], [], ["line 1: seed must be"]),
        (
            [{"prompt": "a"}, {"prompt": "b", "size": "2048"}],
            ["--hires-scale", "4"],
            ["line 2: the size after hires_scale"],
        ),
        ([{"prompt": "a"}], ["--hires-scale", "0.5"], ["line 1: hires_scale must be above 1"]),
        ([{"prompt": "a"}], ["--guidance", "3,4"], ["--guidance must be one number"]),
        ([{"prompt": "a"}], ["--output", "a.bmp"], ["--output must end in .png"]),
        ([{"prompt": "a"}], ["--batch-size", "0"], ["batch_size must be a whole number"]),
    ],
)
def test_mistakes_are_named_before_any_work(
    rows: Any,
    more: list[str],
    message: list[str],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(words(tmp_path, model, *more)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(message)
    for line, expected in zip(said, message, strict=True):
        assert re.search(expected, line), line
    assert not [*tmp_path.glob("out/*")]


@pytest.mark.parametrize(
    "given",
    [["a", "--prompts", "f"], ["a", "--contact-sheet", "s.png"], ["a", "--batch-size", "2"]],
)
def test_options_that_do_not_go_together(given: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code == 2


@pytest.mark.slow
def test_launched_processes(model: str, tmp_path: Path) -> None:
    script, sheet = ROOT / "inference" / "generate.py", tmp_path / "sheet.png"
    done = launch(script, words(tmp_path, model, "--contact-sheet", sheet), "ddp_cpu_2.yaml")
    assert done.returncode == 0, done.stderr
    assert sorted(files(tmp_path / "out")) == NAMES and sheet.exists()
    for rank in (0, 1):
        assert f"process {rank} of 2: 4 images made, 0 were there" in done.stdout
