"""MODEL.yaml beside a single file of Stable Diffusion's size, and words in its metadata."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.errors import UserError
from latentdiff.formats import single_file as single_file
from latentdiff.formats.folder import Components
from latentdiff.formats.single_file import load_single_file
from latentdiff.tensor_file import TensorFile
from tests.formats.test_single_file import virtual

#: As in github.com/CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml.
V1: dict[str, Any] = {
    "linear_start": 0.00085,
    "linear_end": 0.0120,
    "timesteps": 1000,
    "image_size": 64,
    "channels": 4,
    "conditioning_key": "crossattn",
    "scale_factor": 0.18215,
    "use_ema": False,
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "attention_resolutions": [4, 2, 1],
            "num_res_blocks": 2,
            "channel_mult": [1, 2, 4, 4],
            "num_heads": 8,
            "use_spatial_transformer": True,
            "transformer_depth": 1,
            "context_dim": 768,
            "legacy": False,
        },
    },
    "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
}


def unet(params: dict[str, Any], **changes: Any) -> dict[str, Any]:
    section = params["unet_config"]
    return params | {"unet_config": section | {"params": section["params"] | changes}}


#: As in github.com/Stability-AI/stablediffusion, v2-inference.yaml and v2-inference-v.yaml.
V2 = unet(V1, context_dim=1024, num_head_channels=64, use_linear_in_transformer=True)
V2_V = V2 | {"parameterization": "v"}

#: A list of lists of lists …: each holds the one before it nine times.
BOMB = "a0: &a0 [x]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open a file of full size whose weights take no memory, with a YAML beside it."""

    def measured(*_: Any) -> str:
        raise AssertionError("the weights were asked")

    def load(
        version: str,
        params: dict[str, Any] | str | None,
        metadata: dict[str, str] | None = None,
        prediction: str | None = None,
        **extra: Tensor,
    ) -> Components:
        model = tmp_path / "sd.ckpt"
        whole = TensorFile(model, virtual(version, **extra), metadata or {})
        monkeypatch.setattr(single_file, "read_tensor_file", lambda _: whole)
        monkeypatch.setattr(single_file, "measured_prediction", measured)
        if params is not None:
            wrapped = {"model": {"target": "ldm.….LatentDiffusion", "params": params}}
            text = params if isinstance(params, str) else yaml.safe_dump(wrapped)
            (tmp_path / "sd.yaml").write_text(text, encoding="utf-8")
        return load_single_file(model, prediction=prediction)

    return load


@pytest.mark.parametrize(
    ("version", "params", "metadata", "expected"),
    [
        ("1", V1, {}, ("eps", 64)),
        ("1", V1 | {"parameterization": "v"}, {}, ("v", 64)),
        ("1", V1 | {"parameterization": "x0"}, {}, ("x0", 64)),
        ("1", {"parameterization": "v"}, {}, ("v", 64)),
        ("1", V1 | {"parameterization": "v", "image_size": 96}, {}, ("v", 96)),
        ("1", V1, {"modelspec.prediction_type": "v"}, ("v", 64)),
        ("2", V2, {}, ("eps", 64)),
        ("2", V2_V, {}, ("v", 96)),
        ("2", V2_V, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, ("v", 96)),
    ],
)
def test_prediction_and_size(
    version: str, params: Any, metadata: dict[str, str], expected: Any, opened: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = opened(version, params, metadata)
    assert (found.prediction, found.unet.config.sample_size) == expected
    assert found.schedule == ScheduleConfig()  # as all of Stable Diffusion
    assert found.autoencoder.scale == 0.18215


def test_who_counts_when_two_say_different_things(opened: Any) -> None:
    said = V1 | {"parameterization": "v"}
    with pytest.warns(UserWarning, match="predicts v, the file itself says eps; v is taken"):
        assert opened("1", said, {"modelspec.prediction_type": "epsilon"}).prediction == "v"
    assert opened("1", said, prediction="eps").prediction == "eps"
    assert opened("1", V1, v_pred=torch.zeros(0)).prediction == "v"


def test_schedule_and_scale(opened: Any) -> None:
    changed = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 500, "scale_factor": 0.5}
    for kind, ours in (
        ("linear", "scaled_linear"),
        ("sqrt_linear", "linear"),
        ("cosine", "cosine"),
    ):
        found = opened("1", V1 | changed | {"beta_schedule": kind})
        assert found.schedule == ScheduleConfig(ours, 500, 0.0015, 0.0195)
        assert found.autoencoder.scale == 0.5


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (unet(V1, context_dim=1024), "of another model: it says context_dim 1024, .* have 768"),
        (unet(V1, in_channels=9), "of another model: it says in_channels 9, .* have 4"),
        (V1 | {"parameterization": "w"}, "parameterization .* must be one of eps, v, x0; got 'w'"),
        (V1 | {"parameterization": ["v"]}, "must be one of eps, v, x0"),
        (V1 | {"beta_schedule": "sqrt"}, "beta_schedule .* must be one of linear"),
        (
            V1 | {"linear_start": "x"},
            r"linear_start in .*sd\.yaml must be a number from 0 to 1; got 'x'",
        ),
        (V1 | {"timesteps": 10**12}, r"timesteps in .*sd\.yaml must be a number"),
        (V1 | {"image_size": -1}, r"image_size in .*sd\.yaml must be a number from 1"),
        (V1 | {"scale_factor": 0}, r"scale_factor in .*sd\.yaml must be a number from 1e-06"),
        (V1 | {"scale_factor": "x"}, r"scale_factor in .*sd\.yaml must be .*; got 'x'"),
        ("model: [", "is not valid YAML"),
        ("[" * 100_000, "is not valid YAML: it is nested too deeply"),
        (BOMB, "is not valid YAML: more than 100000 values"),
        ("{[a]: b}", "is not valid YAML"),
        ("# " + "x" * 2**20, "more than 1,048,576 bytes"),
    ],
)
def test_what_cannot_be_is_refused(params: Any, words: str, opened: Any) -> None:
    with pytest.raises(UserError, match=words):
        opened("1", params)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "data:\n  path: images"])
def test_yaml_of_something_else_is_left_out_aloud(text: str, opened: Any) -> None:
    with pytest.warns(UserWarning, match="is left out: it is no inference configuration"):
        assert opened("1", text).prediction == "eps"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("epsilon", "eps"),
        ("eps", "eps"),
        ("v", "v"),
        ("v_prediction", "v"),
        (" V-Prediction ", "v"),
        ("v_pred", "v"),
        ("sample", "x0"),
    ],
)
def test_words_for_the_prediction(word: str, expected: str, opened: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened("1", None, {"modelspec.prediction_type": word}).prediction == expected


def test_an_unknown_word_is_said(opened: Any) -> None:
    with pytest.warns(UserWarning, match=r"says 'velocity\\x1b' for what it predicts .* none of"):
        found = opened("1", None, {"modelspec.prediction_type": "velocity\x1b"})
    assert found.prediction == "eps"
