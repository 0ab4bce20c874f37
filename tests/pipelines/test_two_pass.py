"""hires_scale: a small image, enlarged, is what the large one begins from."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff.errors import UserError
from latentdiff.pipelines import call as call_module
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.pipelines.metadata import parameters
from latentdiff.pipelines.task import Progress
from tests.random_models import make_pipeline

CALL: dict[str, Any] = {"seed": 5, "num_inference_steps": 4, "output_type": "pt", "progress": False}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionPipeline:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return LatentDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_second_pass_is_image_to_image_on_the_first_enlarged(
    pipeline: LatentDiffusionPipeline, strength: float
) -> None:
    several = {"num_images_per_prompt": 2, "batch_size": 3}
    prompts = ["a cat", "a dog"]
    found = pipeline(prompts, hires_scale=1.5, hires_strength=strength, **several, **CALL)
    small = pipeline(prompts, **several, **CALL).images * 2 - 1
    large = F.interpolate(small, size=(48, 48), mode="bicubic").clamp(-1, 1) / 2 + 0.5
    for k in range(4):
        expected = one(pipeline, prompts[k // 2], large[k : k + 1], strength, 5 + k)
        assert float((found.images[k] - expected).abs().max()) <= 1 / 255
    assert found.seeds == [5, 6, 7, 8]
    assert found.steps == 4 * strength


def one(
    pipeline: LatentDiffusionPipeline, prompt: str, large: Tensor, strength: float, seed: int
) -> Tensor:
    """By image_to_image; at strength 0 that gives the image itself, this the autoencoder's."""
    if strength:
        call = {**CALL, "seed": seed}
        return pipeline.image_to_image(prompt, large, strength, **call).images[0]
    latents = pipeline.autoencoder.encode(large * 2 - 1)
    return pipeline.autoencoder.decode(latents)[0] / 2 + 0.5


def test_it_is_streamed_stopped_and_recorded(
    pipeline: LatentDiffusionPipeline,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = {**CALL, "hires_scale": 2, "hires_strength": 0.5, "output_type": "pil"}
    *steps, output = pipeline.stream("a cat", **call)
    sizes = [tuple(e.latents.shape[2:]) for e in steps if isinstance(e, Progress)]
    assert sizes == [(16, 16)] * 4 + [(32, 32)] * 2
    assert [(e.step, e.total) for e in steps if isinstance(e, Progress)] == counted(6)
    assert not isinstance(output, Progress)
    (settings,) = output.settings
    assert (settings["height"], settings["width"]) == (32, 32)
    assert settings["arguments"] == {"hires_scale": 2, "hires_strength": 0.5}
    assert "Size: 32x32" in parameters(settings)
    assert "Denoising strength: 0.5, Hires upscale: 2" in parameters(settings)

    reported: list[Progress] = []
    several = {"num_images_per_prompt": 3, "batch_size": 2, "on_progress": reported.append}
    monkeypatch.setattr(call_module, "tqdm", partial(tqdm, mininterval=0))
    pipeline("a cat", **{**call, **several, "progress": True})
    assert [(one.step, one.total) for one in reported] == counted(12)
    assert "12/12" in capsys.readouterr().err

    def stop(pipe: Any, step: int, timestep: float, given: Any) -> None:
        pipe._interrupt = True

    (image,) = pipeline("a cat", **call, callback_on_step_end=stop).images
    assert isinstance(image, Image.Image) and image.size == (32, 32)


def counted(total: int) -> list[tuple[int, int]]:
    return [(step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hires_scale": 1}, "hires_scale must be above 1 and at most 8; got 1"),
        ({"hires_scale": "2"}, "hires_scale must be above 1"),
        ({"hires_scale": 2, "hires_strength": 1.5}, "hires_strength must be a number in 0 … 1"),
        ({"hires_scale": 8, "height": 2048, "width": 2048}, "the size after hires_scale must be"),
    ],
)
def test_what_is_out_of_range_is_refused(
    pipeline: LatentDiffusionPipeline, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline("a cat", **given)
