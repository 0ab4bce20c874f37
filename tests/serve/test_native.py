"""The page's protocol: every task, what is refused before it begins, and settings of files."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from latentdiff import LatentDiffusionPipeline
from latentdiff.images import encoded_image
from latentdiff.serve.app import create_app
from latentdiff.serve.native import PREVIEW, TASKS
from latentdiff.serve.settings import Settings
from tests.random_models import make_pipeline

STEPS, SEED = 2, 2**63 + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("models") / "tiny"
    make_pipeline().save_pretrained(model)
    (model.parent / "loras").mkdir()
    return model


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    settings = Settings(
        models=(str(folder),),
        lora_dir=str(folder.parent / "loras"),
        max_steps=9,
        max_pixels=64 * 64,
    )
    app = create_app(settings)
    with app.state.server.models.use(None, None):
        pass
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def picture(size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def mask() -> Image.Image:
    image = Image.new("L", (32, 32))
    image.paste(255, (8, 8, 24, 24))
    return image


def as_text(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded_image(image, ".png", {})).decode()


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def lines(client: TestClient, task: str, **asked: Any) -> list[dict[str, Any]]:
    answer = client.post(f"/api/{task}", json=asked)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


ARGUMENTS: dict[str, dict[str, Any]] = {
    "text_to_image": {"prompt": "a cat", "width": 16, "height": 24, "hires_scale": 1.5},
    "image_to_image": {"prompt": "a (cat:1.2)", "image": picture(), "strength": 0.5},
    "inpaint": {"prompt": "a cat", "image": picture(), "mask_image": mask(), "mask_blur": 2},
    "outpaint": {"prompt": "a cat", "image": picture(), "left": 8, "top": 3},
    "variations": {"image": picture()},
    "colorize": {"image": picture(mode="L")},
    "restore": {"image": picture((29, 30)), "kind": "deblur", "blur": 1.0},
    "upscale": {"image": picture((16, 17)), "scale": 2.0},
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_gives_what_the_pipeline_gives(
    task: str, client: TestClient, folder: Path
) -> None:
    given = ARGUMENTS[task]
    asked = {n: as_text(v) if isinstance(v, Image.Image) else v for n, v in given.items()}
    shared = {"num_inference_steps": STEPS, "seed": str(SEED), "num_images": 2}
    *_, result = lines(client, task, **asked, **shared)
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    method = pipeline if task == "text_to_image" else getattr(pipeline, task)
    options: dict[str, Any] = {"num_images_per_prompt": 2, "prompt_syntax": "a1111"}
    expected = method(**given, num_inference_steps=STEPS, seed=SEED, progress=False, **options)
    assert result["event"] == "result"
    assert [one["seed"] for one in result["images"]] == [str(SEED), str(SEED + 1)]
    each = zip(result["images"], expected.images, expected.settings, strict=True)
    for one, own, settings in each:
        assert one["settings"]["guidance_scale"] == settings["guidance_scale"]
        assert one["settings"]["seed"] == one["seed"]
        assert one["settings"]["task"] == task
        made = np.asarray(decoded(one["image"]), np.int16)
        assert np.abs(made - np.asarray(own, np.int16)).max() <= 1


IMAGE = as_text(picture())
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("paint", {}, "task must be one of text_to_image, "),
    ("text_to_image", {"seed": "1.5"}, "seed must be a whole number; got '1.5'."),
    (
        "text_to_image",
        {"seed": str(2**64)},
        r"seed must be a whole number from 0 to 2\^64 - 1; got",
    ),
    ("text_to_image", {"seed": "-1"}, "seed must be"),
    ("text_to_image", {"num_inference_steps": 10}, "num_inference_steps may be 9; got 10"),
    ("text_to_image", {"width": 33}, "width must be a multiple of 2; got 33. The nearest is 32."),
    ("text_to_image", {"width": 128, "height": 64}, "width: an image may have 4,096 pixels"),
    ("text_to_image", {"hires_scale": 4.0}, "hires_scale: an image may have 4,096 pixels"),
    ("text_to_image", {"sampler": "eulr"}, "sampler must be one of .* Did you mean 'euler'"),
    ("text_to_image", {"timestep_spacing": "x"}, "timestep_spacing must be one of"),
    ("text_to_image", {"model": "other"}, "model must be one of tiny; got 'other'."),
    ("text_to_image", {"vae": "/etc/passwd"}, "vae must be one of Automatic"),
    ("text_to_image", {"prompt": "a [cat:dog:0.5]"}, "prompt: "),
    ("text_to_image", {"negative_prompt": "a [cow|horse]"}, "negative_prompt: "),
    (
        "text_to_image",
        {"prompt": "<lora:fur:1>"},
        "prompt: .* there is no fur.safetensors in",
    ),
    ("text_to_image", {"image": IMAGE}, "image: text_to_image does not take it"),
    ("image_to_image", {}, "image is missing"),
    ("image_to_image", {"image": "?"}, "image must be an image file in base64"),
    ("image_to_image", {"image": "aGVsbG8="}, "image cannot be read"),
    ("image_to_image", {"image": as_text(picture((65, 64)))}, "image may have 4,096 pixels"),
    ("inpaint", {"image": IMAGE}, "mask_image is missing"),
    ("inpaint", {"image": IMAGE, "mask_image": as_text(picture((8, 9)))}, "mask_image must have"),
    ("outpaint", {"image": IMAGE}, "left: one of left, right, top, bottom must be above 0"),
    ("outpaint", {"image": IMAGE, "top": 4000}, "top: an image may have 4,096 pixels"),
    ("upscale", {"image": IMAGE, "scale": 3.0}, "scale: an image may have 4,096 pixels"),
]


@pytest.mark.parametrize(("task", "asked", "message"), WRONG)
def test_what_is_wrong_is_said_before_anything_is_made(
    task: str, asked: dict[str, Any], message: str, client: TestClient
) -> None:
    answer = client.post(f"/api/{task}", json=asked)
    assert answer.status_code == 422
    assert re.match(message, answer.json()["detail"])


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [
        ("text_to_image", "num_inference_steps", 0),
        ("text_to_image", "num_inference_steps", "abc"),
        ("text_to_image", "num_images", 65),
        ("text_to_image", "guidance_scale", "7"),
        ("text_to_image", "prompt", None),
        ("text_to_image", "cfg", 7),
        ("image_to_image", "strength", 1.1),
        ("restore", "kind", "polish"),
        ("restore", "noise", 0.0),
        ("restore", "blur", 21.0),
        ("inpaint", "mask_blur", 257),
    ],
)
def test_values_of_a_wrong_type_or_range_are_refused_by_the_field(
    task: str, field: str, value: Any, client: TestClient
) -> None:
    answer = client.post(f"/api/{task}", json={field: value})
    assert answer.status_code == 422
    assert [one["loc"] for one in answer.json()["detail"]] == [["body", field]]


def test_progress_has_small_previews_where_they_are_wanted(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the pipeline's are large, as those of a tiny autoencoder."""

    def large(self: LatentDiffusionPipeline, latents: Any) -> list[Image.Image]:
        return [Image.new("RGB", (PREVIEW * 4, PREVIEW))] * len(latents)

    monkeypatch.setattr(LatentDiffusionPipeline, "preview", large)
    asked = {"prompt": "a cat", "num_inference_steps": STEPS, "num_images": 2}
    *progress, _ = lines(client, "text_to_image", previews=True, **asked)
    assert progress[-1]["share"] == 1
    assert progress[-1]["seconds_left"] >= 0
    shown = [decoded(url).size for url in progress[-1]["previews"]]
    assert shown == [(PREVIEW, PREVIEW // 4)] * 2
    *progress, _ = lines(client, "text_to_image", **asked)
    assert all(one["previews"] == [] for one in progress)


def test_the_settings_of_a_file_are_read_digit_for_digit(client: TestClient) -> None:
    asked = {"prompt": "a cat", "negative_prompt": "<img onerror=x>", "seed": str(SEED)}
    *_, result = lines(client, "text_to_image", num_inference_steps=STEPS, **asked)
    (made,) = result["images"]
    file = base64.b64decode(made["image"].partition(",")[2])
    found = client.post("/api/settings", content=file).json()
    assert found["program"] == "latentdiff"
    assert found["settings"] == made["settings"]
    assert {name: found["settings"][name] for name in asked} == asked
    plain = encoded_image(picture(), ".png", {})
    assert client.post("/api/settings", content=plain).json()["why_not"]
    for nothing in (b"", b"hello"):
        refused = client.post("/api/settings", content=nothing)
        assert refused.status_code == 422
        assert refused.json()["detail"].startswith("the file cannot be read as an image")


def test_info_says_what_is_meant_by_what_is_left_out(client: TestClient) -> None:
    info = client.get("/api/info").json()
    assert info["defaults"]["tiny"] == {
        "width": 32,
        "height": 32,
        "multiple": 2,
        "guidance_scale": 5.0,
        "sampler": "ddim",
    }
    assert {of["num_inference_steps"] for of in info["tasks"].values()} == {25}
    strengths = {task: of["strength"] for task, of in info["tasks"].items() if "strength" in of}
    assert strengths == {
        "image_to_image": 0.8,
        "inpaint": 1.0,
        "outpaint": 1.0,
        "variations": 0.7,
        "colorize": 0.7,
        "restore": 0.5,
        "upscale": 0.5,
    }
