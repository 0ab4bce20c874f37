"""An image made again from its file is the same image, and what differs is said."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from latentdiff import LatentDiffusionPipeline
from latentdiff.cli import edit, generate, inspect
from latentdiff.errors import UserError
from latentdiff.formats.embedding import write_embedding
from latentdiff.formats.lora import write_lora
from latentdiff.images import grid
from latentdiff.models.low_rank import LowRank
from latentdiff.pipelines.hashes import file_hash, model_hash
from latentdiff.pipelines.metadata import of_grid, pixels_hash, read, write
from latentdiff.pipelines.replay import Replay
from tests.random_models import TEXT_WIDTH, make_pipeline

FAST: dict[str, Any] = {"num_inference_steps": 3, "progress": False}
LONG = "a cat, " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "cats"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(model: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(model)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the text encoder takes|the negative prompt")
        yield


def pixels(file: Path) -> Any:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("a cat", {}),
        ("a cat", {"num_images_per_prompt": 3, "batch_size": 2, "seed": 2**64 - 3}),
        (["a cat", LONG, "dog", LONG], {"prompt_syntax": "long", "sampler": "euler_ancestral"}),
        (["a (cat:1.2)", "dog"], {"prompt_syntax": "a1111", "negative_prompt": ["", "[x]"]}),
        (["a cat", "dog", "x"], {"guidance_scale": [1, 3, 9.5], "guidance_rescale": 0.5}),
        ("a {cat|dog} {x|y|z}", {"num_images_per_prompt": 4, "wildcards": ".", "seed": 7}),
        ("a cat", {"timesteps": [900, 500.5, 20], "num_images_per_prompt": 2}),
        ("a cat", {"hires_scale": 1.5, "num_images_per_prompt": 2, "hires_strength": 0.5}),
        ("a cat", {"clip_skip": 1, "sampler": "DPM++ 2M Karras", "guidance_interval": (200, 800)}),
        ("a cat", {"sampler": "ddim", "sampler_options": {"eta": 0.7, "clip": 2.0}, "width": 48}),
    ],
)
def test_each_image_of_a_call_is_made_again_to_the_bit(
    prompt: Any, options: dict[str, Any], pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    output = pipeline(prompt, **{**FAST, **options})
    for file, image, seed in zip(
        output.save(tmp_path / "a.png"), output.images, output.seeds, strict=True
    ):
        replay = Replay.of(file)
        again = replay.run(pipeline, {}, progress=False)
        assert replay.verdict(again, {}) == f"{file}: the same image, bit for bit"
        np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(image))
        assert again.seeds == [seed] == [replay.settings["seed"]]
        assert len(again.settings) == len(again.images) == 1
        in_place = other_alone(replay).run(pipeline, {}, progress=False)
        np.testing.assert_array_equal(np.asarray(in_place.images[0]), np.asarray(image))
        assert in_place.settings[0]["batch"] == replay.settings["batch"]


def other_alone(replay: Replay) -> Replay:
    """A replay to which the image alone is not the same."""
    record = dataclasses.replace(replay.record, settings={**replay.settings, "pixels": "other"})
    return Replay(replay.file, record)


PHOTO = Image.effect_mandelbrot((29, 21), (-2, -1.5, 1, 1.5), 50).convert("RGB")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    PHOTO.save(file)
    mask = Image.new("L", PHOTO.size)
    mask.paste(255, (5, 3, 20, 15))
    mask.save(file.with_name("mask.png"))
    return file


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("image_to_image", {"strength": 0.6, "prompt": ["a cat", "dog"]}),
        ("image_to_image", {"prompt": ["a cat", LONG, "dog"], "prompt_syntax": "long"}),
        ("inpaint", {"mask_image": "mask.png", "mask_blur": 2, "num_images_per_prompt": 3}),
        ("inpaint", {"mask_image": "mask.png", "padding_mask_crop": 4, "strength": 0.5}),
        ("outpaint", {"left": 5, "bottom": 3, "sampler": "euler_ancestral"}),
        ("variations", {"batch_size": 3}),
        ("colorize", {"prompt": "", "num_images_per_prompt": 2}),
        ("restore", {"kind": "denoise", "noise": 0.2, "num_images_per_prompt": 2}),
        ("restore", {"kind": "deblur", "prompt": ""}),
        ("restore", {"kind": "jpeg", "quality": 20}),
        ("upscale", {"scale": 1.5, "strength": 0.7}),
        ("interpolate", {"prompt": ["a cat", "dog"], "frames": 3, "guidance_scale": [1, 3]}),
        ("interpolate", {"prompt": "a cat", "seed": [5, 9, 2**40], "frames": 5, "batch_size": 2}),
    ],
)
def test_each_image_of_a_task_is_made_again_to_the_bit(
    task: str,
    arguments: dict[str, Any],
    photo: Path,
    pipeline: LatentDiffusionPipeline,
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"prompt": "a cat", **arguments, **FAST}
    if task != "interpolate":
        given["image"] = photo
    if "mask_image" in given:
        given["mask_image"] = photo.with_name("mask.png")
    output = getattr(pipeline, task)(**given)
    for file, image in zip(output.save(tmp_path / "a.png"), output.images, strict=True):
        replay = Replay.of(file)
        assert replay.settings["task"] == task
        assert (replay.settings["width"], replay.settings["height"]) == image.size
        again = replay.run(pipeline, {}, progress=False)
        assert replay.verdict(again, {}) == f"{file}: the same image, bit for bit"
        in_place = other_alone(replay).run(pipeline, {}, progress=False)
        assert in_place.settings[0]["batch"] == replay.settings["batch"]
        for one in (again, in_place):
            np.testing.assert_array_equal(np.asarray(one.images[0]), np.asarray(image))
    sheet = write(grid(output.images, 2), tmp_path / "b.png", of_grid(output.settings, 2))
    again = Replay.of(sheet).run(pipeline, {}, progress=False)
    assert Replay.of(sheet).verdict(again, {}).endswith("the same image, bit for bit")
    assert again.settings == output.settings


def test_an_image_that_is_replaced_meanwhile_is_recorded_as_it_was(
    pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    """Its file is read once, and so is the mask's."""
    mask = PHOTO.convert("L")
    files = {"image": tmp_path / "a.png", "mask_image": tmp_path / "b.png"}
    for name, one in (("image", PHOTO), ("mask_image", mask)):
        one.save(files[name])

    def replace(_: Any) -> None:
        for file in files.values():
            Image.new("RGB", PHOTO.size).save(file)

    (settings,) = pipeline.inpaint("a cat", **files, on_progress=replace, **FAST).settings
    for name, one in (("image", PHOTO), ("mask_image", mask)):
        assert settings["arguments"][name] == {"file": str(files[name]), "hash": pixels_hash(one)}


def test_images_that_were_given_are_known_by_their_pixels(
    photo: Path, pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    copy, other = tmp_path / "copy.png", PHOTO.rotate(180)
    PHOTO.save(copy)
    call: dict[str, Any] = {"strength": 0.5, "seed": 3, **FAST}
    given = [copy, PHOTO, np_tensor(PHOTO), other]
    outputs = [pipeline.image_to_image("a cat", one, **call) for one in given]
    described = [output.settings[0]["arguments"]["image"] for output in outputs]
    assert described[0] == {"file": str(copy), "hash": pixels_hash(PHOTO)}
    assert described[1] == {"file": None, "hash": pixels_hash(PHOTO)}
    assert len({one["hash"] for one in described}) == 3 and "file" not in described[2]
    several = pipeline.image_to_image("a cat", [PHOTO, other], **call).settings
    assert [one["arguments"]["image"] for one in several] == [described[1], described[3]]
    files = [output.save(tmp_path / f"{k}.png")[0] for k, output in enumerate(outputs)]
    for file in files[1:]:
        with pytest.raises(
            UserError, match=r"the image that .* was made from was no file. Give it"
        ):
            Replay.of(file).run(pipeline, {})
    replay = Replay.of(files[0])
    other.save(copy)
    again = replay.run(pipeline, {}, progress=False)
    said = f"image {described[3]['hash']} instead of {described[0]['hash']}"
    assert "another image" in replay.verdict(again, {}) and said in replay.verdict(again, {})
    copy.unlink()
    with pytest.raises(UserError, match=r"is not there: .*copy\.png"):
        replay.run(pipeline, {})
    anew = replay.run(pipeline, {"image": PHOTO}, progress=False)
    np.testing.assert_array_equal(np.asarray(anew.images[0]), np.asarray(outputs[0].images[0]))


def test_edits_from_the_shell(
    photo: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, other = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "other.png"
    PHOTO.rotate(180).save(other)
    words = ["inpaint", photo, "a cat", "--mask", photo.with_name("mask.png"), "--model", model]
    shared = ["--steps", 2, "--num-images", 2, "--separate", "--quiet"]
    assert edit.main([*map(str, [*words, *shared, "--output", old])]) == 0
    old, of = tmp_path / "a-001.png", tmp_path / "a-001.png"
    for program in (edit, generate):
        assert program.main(["--replay", str(old), "--output", str(new), "--quiet"]) == 0
        assert f"{old}: the same image, bit for bit\n" in capsys.readouterr().err
        np.testing.assert_array_equal(pixels(old), pixels(new))
    recorded = read(old).settings["arguments"]
    for given, name, expected in (
        (["--replay", of, "--strength", 0.5], "strength", 0.5),
        (["inpaint", other, "--replay", of], "image", read_image(other)),
    ):
        assert edit.main([*map(str, [*given, "--output", new, "--quiet"])]) == 0
        assert f"{old}: with other {name}\n" in capsys.readouterr().err
        assert read(new).settings["arguments"] == {**recorded, name: expected}
    for program, words, message in (
        (edit, ["outpaint", "--replay", of, "--left", 3], "made by inpaint, which takes no left."),
        (generate, ["--replay", of, "--size", 64], "by inpaint, which takes no height or width."),
        (edit, ["--replay", photo], "does not say how it was made"),
        (edit, ["--replay", of, "--output", of], "--output must not be the file of --replay"),
    ):
        assert program.main([*map(str, words), "--quiet"]) == 2
        assert message in capsys.readouterr().err


def read_image(file: Path) -> dict[str, str]:
    with Image.open(file) as image:
        return {"file": str(file), "hash": pixels_hash(image)}


def np_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255


def call(*arguments: object) -> None:
    assert generate.main([*map(str, arguments), "--quiet"]) == 0


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_grids_and_single_files_from_the_shell(
    ending: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / f"a.{ending}", tmp_path / "b.png"
    fast = ("--model", model, "--steps", 2, "--seed", 5, "--size", "16x32")
    for arguments in (("a cat", "dog", "--num-images", 3), ("a cat",)):
        call(*arguments, *fast, "--output", old)
        call("--replay", old, "--output", new)
        assert f"{old}: the same image, bit for bit\n" in capsys.readouterr().err
        if ending == "png":
            np.testing.assert_array_equal(pixels(old), pixels(new))
        record = read(new).settings
        assert record == {**read(old).settings, "pixels": record["pixels"]}


def test_adapters_are_found_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    lora, word = tmp_path / "fur.safetensors", tmp_path / "word.safetensors"
    change = LowRank(torch.randn(2, 32), torch.randn(32, 2), 2.0)
    write_lora(lora, {"unet.mid_block.attentions.0.proj_in": change})
    write_embedding(word, "<a>", torch.randn(2, TEXT_WIDTH))
    old, new = tmp_path / "a.png", tmp_path / "b.png"
    fast = ("--model", model, "--steps", 2, "--output", old)
    call("a <b>", *fast, "--lora", f"{lora}:0.5", "--embedding", f"{word}=<b>")
    call("--replay", old, "--output", new)
    assert "bit for bit\n" in capsys.readouterr().err
    settings = read(new).settings
    name_and_weight = {"name": "fur", "weight": 0.5, "hash": file_hash(lora)[:10]}
    assert settings["loras"] == [{**name_and_weight, "file": str(lora)}]
    assert settings["embeddings"][0]["token"] == "<b>"
    call("--replay", old, "--output", new, "--lora", f"{lora}:0.2")
    said = capsys.readouterr().err
    assert "another image" in said
    hashed = file_hash(lora)[:10]
    assert f"; LoRA {hashed} at 0.2 instead of {hashed} at 0.5\n" in said


def test_what_differs_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, other = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "other"
    make_pipeline(seed=1).save_pretrained(other)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    call("a cat", "--model", model, "--steps", 2, "--output", old)
    torch.set_num_threads(threads)
    hashes = model_hash(other), model_hash(model)
    call("--replay", old, "--output", new, "--model", other)
    most = np.abs(pixels(old) - pixels(new)).max()
    assert (
        f"{old}: another image, differing by up to {most}/255; "
        f"model {hashes[0]} instead of {hashes[1]}\n"
    ) in capsys.readouterr().err
    settings = read(old).settings
    image = Image.open(old).convert("RGB")
    write(image, old, {**settings, "versions": {"torch": "1.0"}})
    call("--replay", old, "--output", new)
    assert f"bit for bit; torch {torch.__version__} instead of 1.0" in capsys.readouterr().err
    assert read(new).settings["threads"] == 3 and torch.get_num_threads() == threads
    image.putpixel((0, 0), (1, 2, 3))
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("latentdiff", json.dumps(settings))
    image.save(old, pnginfo=chunks)
    call("--replay", old, "--output", new)
    assert (
        f"{old}: edited after it was made; this is the image as it was made\n"
        in capsys.readouterr().err
    )


def test_options_beside_it_replace_what_is_recorded(
    pipeline: LatentDiffusionPipeline, model: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "a.png", tmp_path / "b.png"
    options = {"negative_prompt": "dog", "seed": 4, "num_images_per_prompt": 2}
    pipeline("a cat", sampler="euler", **options, **FAST).save(old)
    call("--replay", tmp_path / "a-001.png", "--output", new, "--steps", 2, "--guidance", 3)
    changed = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5}
    settings = read(new).settings
    assert {**settings, **changed, "prompt": "a cat", "negative_prompt": "dog"} == settings
    expected = pipeline(
        "a cat", **{**FAST, **options, **changed, "num_images_per_prompt": 1}, sampler="euler"
    )
    np.testing.assert_array_equal(pixels(new), np.asarray(expected.images[0]))
    call("dog", "x", "--replay", tmp_path / "a-001.png", "--output", new, "--sampler", "ddpm")
    images = [*read(new).settings["images"]]
    assert [one.get("seed", 5) for one in images] == [5, 6] and images[1]["prompt"] == "x"


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_every_file_has_its_own_seed(
    sampler: str, pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    options = {**FAST, "sampler": sampler}
    output = pipeline("a cat", num_images_per_prompt=3, seed=100, **options)
    files = output.save(tmp_path / "a.png")
    assert [read(file).settings["seed"] for file in files] == output.seeds == [100, 101, 102]
    assert ["Seed: 102," in Image.open(file).text["parameters"] for file in files] == [
        False,
        False,
        True,
    ]
    pipeline("a cat", seed=102, **options).save(tmp_path / "b.png")
    assert np.abs(pixels(files[2]) - pixels(tmp_path / "b.png")).max() <= 1
    drawn = pipeline("a cat", **options)
    assert read(drawn.save(tmp_path / "c.png")[0]).settings["seed"] == drawn.seeds[0] >= 0


@pytest.mark.parametrize("seed", [3698135662, 4294967295, 112358132141, 8888888888888888888])
def test_large_seeds_are_kept_digit_for_digit(
    seed: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.png"
    fast = ("a cat", "--model", model, "--steps", 1, "--output", file, "--num-images", 2)
    with pytest.warns(UserWarning, match="starts at timestep"):
        call(*fast, "--seed", seed)
    assert f"Seed: {seed}," in Image.open(file).text["parameters"]  # type: ignore[attr-defined]
    assert [one.get("seed", seed) for one in read(file).settings["images"]] == [seed, seed + 1]
    assert generate.main([*map(str, fast), "--seed", str(2**64)]) == 2
    assert "seed must be a whole number from 0 to 2^64" in capsys.readouterr().err


def test_seeds_above_32_bits_draw_other_images(pipeline: LatentDiffusionPipeline) -> None:
    images = [
        np.asarray(pipeline("a cat", seed=seed, **FAST).images[0])
        for seed in (112358132141, 4294967295)
    ]
    assert not np.array_equal(*images)


def a1111(folder: Path, text: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    Image.new("RGB", (32, 32)).save(folder / "foreign.png", pnginfo=chunks)
    return folder / "foreign.png"


@pytest.mark.parametrize("schedule", ["DPM++ 2M, Schedule type: Karras", "DPM++ 2M Karras"])
def test_settings_of_a1111_are_understood(
    schedule: str,
    pipeline: LatentDiffusionPipeline,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (
        "a (cat:1.2)<lora:fur:0.8>,\npain\nNegative prompt: dog\nSteps: 3, Sampler: "
        f'{schedule}, CFG scale: 4.5, Seed: 8, Size: 48x32, Model: "a, b", Model hash: 012'
    )
    file, new = a1111(tmp_path, text), tmp_path / "b.png"
    with pytest.warns(UserWarning, match="--lora FILE:0.8"):
        call("--replay", file, "--output", new, "--model", model)
    said = capsys.readouterr().err
    assert (
        "made as AUTOMATIC1111 recorded" in said
        and f"model {model_hash(model)} instead of 012" in said
    )
    expected = pipeline(
        "a (cat:1.2),\npain",
        negative_prompt="dog",
        prompt_syntax="a1111",
        guidance_scale=4.5,
        seed=8,
        width=48,
        height=32,
        sampler="dpmpp_2m",
        timestep_spacing="karras",
        **FAST,
    )
    np.testing.assert_array_equal(pixels(new), np.asarray(expected.images[0]))
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in Image.open(new).text["parameters"]  # type: ignore[attr-defined]
    assert inspect.main([str(new)]) == inspect.main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert (
        "made by              latentdiff" in shown and "made by              AUTOMATIC1111" in shown
    )


def damaged(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda settings: {**settings, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings: {}, "its settings are damaged (task is missing"),
        (damaged(seed="1"), "damaged (seed is '1')"),
        (damaged(seed=True), "damaged (seed is True)"),
        (damaged(batch={"size": 10**9}), "damaged (batch is {'size': 1000000000})"),
        (damaged(batch={"size": 2, "place": 2}), "are damaged (it is no image of its batch)"),
        (damaged(sampler_options={"eta": [1]}), "damaged (sampler_options is {'eta': [1]})"),
        (damaged(loras=[{"file": "x"}]), "the weight of a LoRA must be a finite number; got None"),
        (damaged(task="inpaint", images=[{}]), "are damaged: missing a required argument: 'image'"),
        (damaged(threads=10**9), "damaged (threads is 1000000000)"),
        (damaged(loras=[3]), "damaged (loras is [3])"),
        (damaged(dtype="save"), "damaged (dtype is 'save')"),
        (damaged(device="meta"), "damaged (device is 'meta')"),
        (damaged(images=[{"seed": "1"}]), "damaged (images is [{'seed': '1'}])"),
        (damaged(task="save_pretrained"), "it was made by save_pretrained"),
        (damaged(task="variations", arguments={"x": 1}), "by variations, which takes no x."),
        (damaged(arguments={"callback_on_step_end": 3}), "which takes no callback_on_step_end."),
        (damaged(task="interpolate", arguments={"frames": 10**9}), "damaged (arguments is"),
        (damaged(latents="given"), "its noise was given, not drawn"),
        (damaged(num_inference_steps=0), "num_inference_steps must be a whole number"),
        (damaged(height=10**6), "height x width must be at most"),
        (damaged(sampler="no"), "sampler must be one of"),
        (damaged(model={"source": "./nothing"}), "this folder does not exist"),
    ],
)
def test_strangers_files_end_with_one_line(
    change: Any,
    message: str,
    pipeline: LatentDiffusionPipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = pipeline("a cat", **{**FAST, "num_inference_steps": 2}).settings[0]
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("latentdiff", json.dumps(change(settings)))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    new = tmp_path / "b.png"
    assert generate.main(["--replay", str(tmp_path / "a.png"), "--output", str(new)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not new.exists()


def test_what_is_not_recorded_or_not_an_image(
    pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(UserError, match="it does not say how it was made"):
        Replay.of(plain)
    file = a1111(tmp_path, "a cat")
    with pytest.raises(UserError, match=r"made by AUTOMATIC1111\) cannot be made again: .*no set"):
        Replay.of(file)
    noise = torch.randn(1, 4, 16, 16)
    given = pipeline("a cat", latents=noise, height=32, width=32, **FAST).save(file)[0]
    with pytest.raises(UserError, match="its noise was given"):
        Replay.of(given)

    def stop(one: Any, step: int, timestep: float, tensors: Any) -> None:
        one._interrupt = step == 1

    stopped = pipeline("a cat", callback_on_step_end=stop, **FAST).save(file)[0]
    with pytest.raises(UserError, match="it was interrupted before"):
        Replay.of(stopped)
    array = pipeline("a cat", output_type="np", **FAST)
    with pytest.raises(UserError, match="output_type='pil'"):
        array.save(file)


def test_an_own_model_without_files_and_a_model_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    made = make_pipeline()
    made.save_pretrained(folder)
    loaded = LatentDiffusionPipeline.from_pretrained(folder)
    first = loaded("a cat", **FAST).settings[0]["model"]
    assert first["source"] == str(folder) and first["name"] == "m"
    assert first["hash"] == model_hash(folder)
    in_memory = LatentDiffusionPipeline(loaded.components)
    for part in folder.rglob("*.safetensors"):
        part.unlink()
    assert "source" not in in_memory("a cat", **FAST).settings[0]["model"]


def test_an_autoencoder_from_elsewhere(model: Path, tmp_path: Path) -> None:
    made = make_pipeline()
    for parameter in made.vae.parameters():
        parameter.data.mul_(1.2)
    made.save_pretrained(tmp_path / "other")
    other = LatentDiffusionPipeline.from_pretrained(model, vae=tmp_path / "other")
    output = other("a cat", **FAST)
    call("--replay", output.save(tmp_path / "a.png")[0], "--output", tmp_path / "b.png")
    np.testing.assert_array_equal(pixels(tmp_path / "b.png"), np.asarray(output.images[0]))
    settings = read(tmp_path / "b.png").settings
    assert settings["model"] == output.settings[0]["model"]
    own = LatentDiffusionPipeline.from_pretrained(model, vae=model)("a cat", **FAST)
    assert own.settings[0]["model"]["vae_hash"] != settings["model"]["vae_hash"]


def test_hashes_of_models(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("latentdiff.pipelines.hashes._LARGE", 8)
    file = tmp_path / "a.bin"
    file.write_bytes(b"0123456789")
    expected = hashlib.sha256(b"0123456789").hexdigest()
    assert file_hash(file) == expected and model_hash(file) == expected[:10]
    read_again: list[Path] = []
    monkeypatch.setattr(
        "latentdiff.pipelines.hashes._sha256", lambda f: read_again.append(f) or "x"
    )
    assert file_hash(file) == expected and not read_again
    file.write_bytes(b"01234567890")
    assert file_hash(file) == "x" and read_again == [file]
    (tmp_path / "cache" / "latentdiff" / "hashes.json").write_text("{")
    assert file_hash(file) == "x" and len(read_again) == 2
