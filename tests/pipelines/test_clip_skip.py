"""clip_skip: layers of the text encoder that are left out, in drawing, training and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.finetune.lora import Lora, LoraConfig
from latentdiff.finetune.method import Method
from latentdiff.formats.lora import read_lora
from latentdiff.formats.model import save_model
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.train.config import read_config
from latentdiff.train.parts import load_parts
from tests.random_models import make_pipeline, make_text_model

LAYERS = 3


@pytest.fixture(scope="module")
def theirs() -> Any:
    pipeline = make_pipeline()
    pipeline.text_encoder = make_text_model(num_hidden_layers=LAYERS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("skip", [None, *range(LAYERS)])
def test_the_states_and_the_image_are_diffusers(
    theirs: Any,
    pipeline: LatentDiffusionPipeline,
    skip: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """diffusers leaves layers out for the prompt alone, so it is given both states."""
    # It looks for the final norm below a name that transformers 5 has no more.
    tower = type(theirs.text_encoder)
    monkeypatch.setattr(tower, "text_model", property(lambda self: self), raising=False)
    states = {
        text: theirs.encode_prompt(text, "cpu", 1, False, clip_skip=skip)[0]
        for text in ("a cat", "dog")
    }
    for text, expected in states.items():
        found = pipeline.text_encoder.encode([text], skip)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 4.0}
    expected = theirs(
        prompt_embeds=states["a cat"], negative_prompt_embeds=states["dog"], **call
    ).images[0]
    found = pipeline(
        "a cat", negative_prompt="dog", clip_skip=skip, sampler="ddim", progress=False, **call
    ).images[0]
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 2


@pytest.mark.parametrize("skip", [-1, LAYERS, 1.0, True, "2"])
def test_other_values_are_refused(pipeline: LatentDiffusionPipeline, skip: Any) -> None:
    with pytest.raises(UserError, match=r"clip_skip must be a whole number from 0 to 2.*; got"):
        pipeline("a cat", clip_skip=skip)


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_a_training_with_it_makes_a_model_that_draws_with_it(
    folder: Path, pipeline: LatentDiffusionPipeline, name: str, tmp_path: Path
) -> None:
    expected = pipeline.text_encoder.encode(["a cat"], 1)
    assert not torch.allclose(expected, pipeline.text_encoder.encode(["a cat"]), atol=0.01)
    given = [f"model.pretrained={folder}", "model.clip_skip=1"]
    parts = load_parts(read_config(None, given))[0]
    assert torch.equal(Method(parts).encode(["a cat"]), expected)
    saved = save_model(tmp_path / name, parts)
    if name == "model":
        assert json.loads((saved / "generation_config.json").read_text()) == {"clip_skip": 1}
    trained = LatentDiffusionPipeline.from_pretrained(saved)
    call: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "output_type": "pt"}
    images = [
        p("a cat", clip_skip=skip, progress=False, **call).images
        for p, skip in ((trained, None), (pipeline, 1), (trained, 0), (pipeline, None))
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[2], images[3])
    again = load_parts(read_config(None, [f"model.pretrained={saved}"]))[0]
    assert torch.equal(Method(again).encode(["a cat"]), expected)


def test_a_lora_says_it_in_a1111s_number_and_leaves_unused_layers_alone(
    folder: Path, tmp_path: Path
) -> None:
    parts = load_parts(read_config(None, [f"model.pretrained={folder}", "model.clip_skip=1"]))[0]
    files = Lora(parts, LoraConfig(text_encoder=True)).export(parts, tmp_path, torch.float32)
    for file in files:
        found = read_lora(file)
        assert found.metadata["ss_clip_skip"] == "2"
        text = [key for key in found.weights if "encoder" in key and "layers" in key]
        assert {key.split("layers")[1].strip("._")[0] for key in text} == {"0", "1"}


def test_a_file_that_leaves_out_more_layers_than_there_are_is_refused(
    pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"clip_skip": 3}')
    with pytest.raises(UserError, match=r"clip_skip must be .* from 0 to 2.*; got 3"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)
