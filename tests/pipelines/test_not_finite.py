"""NaN and infinity are never drawn: the part that they come from is named."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentdiff import LatentDiffusionPipeline, weights
from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import Autoencoder, load_autoencoder
from latentdiff.models.finite import NotFiniteError
from latentdiff.train.config import TrainConfig, ValidationConfig
from latentdiff.train.validation import Validator
from tests.random_models import make_pipeline, make_vae

FAST: dict[str, Any] = {"num_inference_steps": 4, "progress": False, "output_type": "pt", "seed": 0}
BROKEN = {
    "unet": (
        "conv_in.weight",
        r"U-Net failed: the latents after step 1 of 4 \(timestep \d+\) .*weight conv_in\.weight",
    ),
    "text_encoder": (
        "module.final_layer_norm.weight",
        "text encoder failed: its states .*weight final_layer_norm.weight",
    ),
    "autoencoder": (
        "module.decoder.conv_in.bias",
        "autoencoder's decoder failed: its pixels .*weight decoder.conv_in.bias",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(folder)


def spoil(pipeline: LatentDiffusionPipeline, part: str, value: float) -> None:
    with torch.no_grad():
        getattr(pipeline, part).get_parameter(BROKEN[part][0]).view(-1)[0] = value


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", BROKEN)
def test_a_model_with_broken_weights_is_refused_at_first_use(
    pipeline: LatentDiffusionPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    dtype: torch.dtype,
    value: float,
) -> None:
    spoil(pipeline, part, value)
    monkeypatch.setattr(weights, "refuse_overflow", lambda tensors: None)  # as others write them
    pipeline.save_pretrained(tmp_path / "broken")
    broken = LatentDiffusionPipeline.from_pretrained(tmp_path / "broken", dtype=dtype)
    with pytest.raises(NotFiniteError, match=BROKEN[part][1]):
        broken("a cat", **FAST)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc", "heun", "lcm"])
def test_the_step_is_named(pipeline: LatentDiffusionPipeline, sampler: str) -> None:
    """From its third call on the U-Net overflows, with weights that are whole."""
    calls = 0

    def overflow(module: Any, given: Any, answer: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return answer / 0 if calls > 2 else answer

    pipeline.unet.register_forward_hook(overflow)
    call = {**FAST, "sampler": sampler, "timesteps": [900, 600, 300, 100]}
    step, t = (2, 600) if sampler == "heun" else (3, 300)  # heun calls twice a step
    message = rf"U-Net failed.*step {step} of 4 \(timestep {t}\).*its weights do not: what it was"
    with pytest.raises(NotFiniteError, match=message):
        pipeline("a cat", **{**call, "output_type": "latent"})
    calls = 0
    pipeline.unet.half()
    pipeline.unet.forward = lambda x, t, kv: torch.zeros_like(x)
    with pytest.raises(NotFiniteError, match=r"step \d of 4.*float16 is too narrow"):
        pipeline("a cat", **call)


def test_inversion_names_the_part(pipeline: LatentDiffusionPipeline) -> None:
    image = torch.rand(1, 3, 32, 32)
    spoil(pipeline, "unet", torch.nan)
    with pytest.raises(NotFiniteError, match=r"U-Net failed.*conv_in\.weight"):
        pipeline.invert(image, "a cat", num_inference_steps=2)
    spoil(pipeline, "text_encoder", torch.nan)
    with pytest.raises(NotFiniteError, match=r"text encoder failed.*final_layer_norm\.weight"):
        pipeline.invert(image, "a cat", num_inference_steps=2)
    with torch.no_grad():
        pipeline.autoencoder.module.encoder.conv_in.bias[0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"autoencoder's encoder failed.*encoder\.conv_in\.b"):
        pipeline.invert(image, "a cat", num_inference_steps=2)


@pytest.fixture(params=["kl", "tiny"])
def loud(request: pytest.FixtureRequest, tmp_path: Path) -> Autoencoder:
    """A decoder whose values leave float16 behind the first layer; float32 holds them."""
    make_vae(request.param).save_pretrained(tmp_path)
    vae = load_autoencoder(tmp_path)
    convolutions = (m for m in vae.module.decoder.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        first = next(convolutions)
        first.weight *= 6e4 / first.weight.abs().max()
    vae.module.half().float()  # weights that float16 holds exactly
    return vae


def test_a_decoder_that_overflows_in_float16_decodes_in_float32(loud: Autoencoder) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    right = loud.decode(latents)
    assert right.std() > 0.1
    loud.module.half()
    with pytest.warns(UserWarning, match="overflowed in float16; it is in float32") as told:
        found = loud.decode(latents)
    assert len(told) == 1 and loud.dtype == torch.float32
    torch.testing.assert_close(found, right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(loud.decode(latents), right)


@pytest.mark.filterwarnings("ignore:the autoencoder's decoder overflowed")
@pytest.mark.parametrize("loud", ["kl"], indirect=True)  # the tiny one bounds its input
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_float32_cannot_hold_either_is_no_image(loud: Autoencoder, dtype: torch.dtype) -> None:
    loud.module.to(dtype)
    with pytest.raises(NotFiniteError, match=r"decoder failed: its pixels.*its weights do not"):
        loud.decode(torch.full((1, 4, 8, 8), 3e38))
    with pytest.raises(NotFiniteError, match="the latents to decode hold NaN or infinity"):
        loud.decode(torch.full((1, 4, 8, 8), torch.nan))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_initial_latents_must_be_finite(pipeline: LatentDiffusionPipeline, value: float) -> None:
    latents = torch.zeros(1, 4, 16, 16)
    latents[0, 1, 2, 3] = value
    with pytest.raises(UserError, match="latents must be finite"):
        pipeline("a cat", latents=latents, **FAST)


def test_validation_says_that_there_are_no_images_and_leaves_the_run_alone(
    pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    from accelerate import Accelerator

    said: list[str] = []
    schedule = ScheduleConfig(zero_terminal_snr=True)
    prompted = ValidationConfig(prompts=("a cat",), steps=2)
    config = TrainConfig(str(tmp_path), schedule=schedule, validation=prompted)
    latents: Any = SimpleNamespace(data=SimpleNamespace(shape=(8, 16, 16)), held_out=[], train=[])
    ema: Any = SimpleNamespace(applied=nullcontext)
    tracker: Any = SimpleNamespace(
        say=said.append, image=lambda *_: None, tolerate_failure=lambda what: nullcontext()
    )
    context: Any = pipeline.text_encoder.encode
    components, accelerator = pipeline.components, Accelerator(cpu=True)
    validator = Validator(config, components, latents, context, ema, tracker, accelerator)
    with torch.no_grad():
        validator(1)
    drawn = {path.name for path in (tmp_path / "samples").iterdir()}
    assert drawn == {"step-00000001.png", "step-00000001-raw.png"} and not said
    spoil(pipeline, "unet", torch.nan)
    with torch.no_grad():
        validator(2)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == drawn
    assert len(said) == 2 and all(
        s.startswith("step 2: no images: the U-Net failed: the latents after step 1") for s in said
    )
