"""What all protocols refuse alike, before anything is made."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from latentdiff.errors import UserError
from latentdiff.serve.models import Models
from latentdiff.serve.requests import MAX_PROMPT, from_base64, orders
from latentdiff.serve.settings import Settings
from tests.random_models import make_pipeline
from tests.serve.serving import client_of

PROTOCOLS = ("/sdapi/v1/txt2img", "/api/text_to_image", "/v1/images/generations")


@pytest.fixture(scope="module")
def client(model: str) -> Iterator[TestClient]:
    with client_of(model) as client:
        yield client


def refusal(client: TestClient, path: str, **asked: Any) -> str:
    """What is said of a request that is refused, with nothing queued of it."""
    answer = client.post(path, json=asked)
    assert answer.status_code in (400, 422), answer.text
    assert client.app.state.server.engine.made == 0  # type: ignore[attr-defined]
    return answer.text


@pytest.mark.parametrize("path", PROTOCOLS)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_long_texts(path: str, name: str, client: TestClient) -> None:
    text = refusal(client, path, **{"prompt": "a", name: "a" * (MAX_PROMPT + 1)})
    assert name in text and ("32,000" in text or "32000" in text)


@pytest.mark.parametrize("path", PROTOCOLS)
@pytest.mark.parametrize(
    ("name", "why"), [("prompt", "started without --lora-dir"), ("negative_prompt", "only prompt")]
)
def test_tags_that_load_nothing(path: str, name: str, why: str, client: TestClient) -> None:
    text = refusal(client, path, **{"prompt": "a", name: "a <lora:fur:1>"})
    assert f"{name}: <lora:fur:1>: " in text and why in text and "latentdiff generate" not in text


class _Server:
    """As much of a server as its limits are about."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.settings = Settings(models=(model,), **settings)
        self.models = Models(self.settings)


def asked(server: Any, task: str = "text_to_image", size: Any = None, **arguments: Any) -> int:
    """How many images such a request is of; size: of its image."""
    image = {} if size is None else {"image": Image.new("RGB", size)}
    return len(orders(server, task, arguments | image))


AT_ONCE: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("text_to_image", {"width": 512}, {"width": 514}, "width"),
    ("text_to_image", {"width": 16, "height": 1024}, {"width": 18, "height": 1024}, "height"),
    ("text_to_image", {"hires_scale": 4}, {"hires_scale": 4.1}, "hires_scale"),
    ("image_to_image", {"size": (128, 128)}, {"size": (128, 129)}, "image"),
    ("variations", {"size": (128, 128)}, {"size": (128, 129)}, "image"),
    ("inpaint", {"size": (128, 128)}, {"size": (128, 129)}, "image"),
    (
        "outpaint",
        {"size": (64, 64), "left": 0, "top": 192},
        {"size": (64, 64), "left": 0, "top": 193},
        "top",
    ),
]


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize(("task", "right", "wrong", "name"), AT_ONCE)
def test_what_the_network_sees_at_once_is_limited_by_the_model(
    task: str, right: Any, wrong: Any, name: str, kind: str, model: str, tmp_path: Path
) -> None:
    """The model is of 32x32 pixels."""
    source = model
    if kind == "file":
        source = str(tmp_path / "small.safetensors")
        make_pipeline().save_pretrained(source)
    server = _Server(source)
    assert asked(server, task, **right) == 1
    with pytest.raises(UserError, match=f"^{name}: an image may have 16,384 pixels"):
        asked(server, task, **wrong)


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("upscale", {"size": (512, 1024), "scale": 2.0}),
        ("colorize", {"size": (2048, 1024)}),
        ("restore", {"size": (2048, 1024)}),
        ("inpaint", {"size": (2048, 1024), "padding_mask_crop": 8}),
    ],
)
def test_what_is_worked_on_in_parts_has_the_server_s_limit(
    task: str, arguments: Any, model: str
) -> None:
    assert asked(_Server(model, max_pixels=2**21), task, **arguments) == 1
    with pytest.raises(UserError, match=f"an image may have {2**21 - 1:,} pixels"):
        asked(_Server(model, max_pixels=2**21 - 1), task, **arguments)


def test_a_larger_model_may_be_asked_for_more(model: str, tmp_path: Path) -> None:
    """Also of a size that is read without loading it, and that is not square."""
    shutil.copytree(model, tmp_path / "large")
    config = tmp_path / "large" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 16', '"sample_size": [96, 64]'))
    server = _Server(str(tmp_path / "large"))
    assert server.models.size(None) == {"width": 128, "height": 192, "multiple": 2}
    assert server.models.loaded == []
    assert asked(server, width=2048) == 1  # 16 x (128 x 192) pixels, where the height is left out
    with pytest.raises(UserError, match=r"^width: an image may have 393,216 pixels"):
        asked(server, width=2050)


def test_the_size_of_what_is_not_here_is_stable_diffusion_s() -> None:
    usual = {"width": 512, "height": 512, "multiple": 1}
    assert Models(Settings(models=("some/model",))).size("some/model") == usual


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("break_", ["\n", "\r\n", " "])
def test_base64_may_have_line_breaks(prefix: str, break_: str) -> None:
    data = np.random.default_rng(0).bytes(300)
    text = prefix + base64.encodebytes(data).decode().replace("\n", break_)
    assert from_base64(text, "image") == data
    with pytest.raises(UserError, match=r"^image must be an image file in base64"):
        from_base64(text + "?", "image")


def test_files_of_the_start_are_those_of_prompts(model: str, tmp_path: Path) -> None:
    (tmp_path / "fur.safetensors").touch()
    server: Any = _Server(model, lora_dir=str(tmp_path))
    (tmp_path / "later.safetensors").touch()
    assert len(orders(server, "text_to_image", {}, prompt="a <lora:fur:1>")) == 1
    assert server.models.loras == ["fur"]
    with pytest.raises(UserError, match=r"^prompt: .* there is no later\.safetensors"):
        orders(server, "text_to_image", {}, prompt="a <lora:later:1>")


@pytest.mark.parametrize(("most", "steps"), [(9, 9), (150, 25)])
def test_steps_that_are_not_said_are_limited_too(most: int, steps: int, model: str) -> None:
    server: Any = _Server(model, max_steps=most)
    assert orders(server, "text_to_image", {})[0].arguments["num_inference_steps"] == steps
    with pytest.raises(UserError, match=f"^num_inference_steps may be {most}; got {most + 1}"):
        orders(server, "text_to_image", {"num_inference_steps": most + 1})
