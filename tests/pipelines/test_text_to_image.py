"""What the pipeline promises beyond its numbers: seeds, batches, outputs and clear errors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.diffusion.noise import image_noise
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.errors import UserError
from tests.random_models import make_pipeline

FAST: dict[str, Any] = {"num_inference_steps": 4, "progress": False, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionPipeline:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return LatentDiffusionPipeline.from_pretrained(folder)


def test_image_k_has_seed_plus_k(pipeline: LatentDiffusionPipeline) -> None:
    many = pipeline(["a cat", "dog"], num_images_per_prompt=2, seed=5, **FAST)
    assert many.seeds == [5, 6, 7, 8]
    assert many.images.shape == (4, 3, 32, 32)
    for k, prompt in enumerate(["a cat", "a cat", "dog", "dog"]):
        alone = pipeline(prompt, seed=5 + k, **FAST).images[0]
        assert (alone - many.images[k]).abs().max() <= 1 / 255


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_batches_do_not_change_images(pipeline: LatentDiffusionPipeline, sampler: str) -> None:
    together = pipeline("a cat", num_images_per_prompt=5, seed=1, sampler=sampler, **FAST)
    chunks = pipeline(
        "a cat", num_images_per_prompt=5, seed=1, sampler=sampler, batch_size=2, **FAST
    )
    assert (together.images - chunks.images).abs().max() <= 1 / 255


def test_drawn_seed_gives_the_image_again(pipeline: LatentDiffusionPipeline) -> None:
    first, other = pipeline("a cat", **FAST), pipeline("a cat", **FAST)
    assert first.seeds != other.seeds
    assert torch.equal(pipeline("a cat", seed=first.seeds[0], **FAST).images, first.images)


def test_output_types(pipeline: LatentDiffusionPipeline) -> None:
    call = {**FAST, "seed": 3}
    unit = pipeline("a cat", **call).images
    assert 0 <= unit.min() < unit.max() <= 1
    array = pipeline("a cat", **{**call, "output_type": "np"}).images
    np.testing.assert_array_equal(array, unit.permute(0, 2, 3, 1).numpy())
    image = pipeline("a cat", **{**call, "output_type": "pil"}).images[0]
    assert (image.size, image.mode) == ((32, 32), "RGB")
    np.testing.assert_array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))
    latents = pipeline("a cat", **{**call, "output_type": "latent"}).images
    torch.testing.assert_close(pipeline.autoencoder.decode(latents) / 2 + 0.5, unit)


def test_a_size_that_no_memory_holds_is_refused_before_any_noise_is_drawn(
    pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentdiff.pipelines.call.batch_noise", lambda *_: pytest.fail())
    with pytest.raises(UserError, match=r"at most 16,777,216 pixels in all.*got 100000x3200"):
        pipeline("a cat", height=100_000, width=3200, **FAST)


def test_size_guidance_and_negative_matter(pipeline: LatentDiffusionPipeline) -> None:
    base = pipeline("a cat", seed=0, **FAST).images
    assert pipeline("a cat", height=16, width=48, **FAST).images.shape == (1, 3, 16, 48)
    for change in ({"guidance_scale": 1.0}, {"negative_prompt": "dog"}, {"guidance_rescale": 0.7}):
        assert not torch.equal(pipeline("a cat", seed=0, **change, **FAST).images, base)
    assert torch.equal(pipeline("a cat", seed=0, negative_prompt="", **FAST).images, base)
    assert not torch.equal(pipeline("dog", seed=0, **FAST).images, base)


def test_guidance_runs_one_batch_per_step(
    pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, projected = [], []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    project = pipeline.unet.project_context
    monkeypatch.setattr(
        pipeline.unet, "project_context", lambda c: projected.append(len(c)) or project(c)
    )
    pipeline(["a cat", "dog", "x"], guidance_scale=3, **FAST)
    pipeline("a cat", guidance_scale=1, **FAST)
    hook.remove()
    assert sizes == [6] * 4 + [1] * 4
    assert projected == [6, 1]


def test_steps_outside_the_interval_run_one_pass(pipeline: LatentDiffusionPipeline) -> None:
    sizes: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    call = {**FAST, "sampler": "ddim", "timesteps": [900, 700, 400, 100], "seed": 0}
    inside = pipeline(["a cat", "dog"], guidance_interval=(300, 800), **call).images
    hook.remove()
    assert sizes == [2, 4, 4, 2]
    assert not torch.equal(pipeline(["a cat", "dog"], **call).images, inside)
    whole = pipeline(["a cat", "dog"], guidance_interval=(0, 999), **call).images
    assert torch.equal(pipeline(["a cat", "dog"], **call).images, whole)


def test_one_guidance_scale_for_each_prompt(pipeline: LatentDiffusionPipeline) -> None:
    scales = [1, 3, 9.5]
    call = {**FAST, "num_images_per_prompt": 2, "batch_size": 4}
    many = pipeline(["a cat", "dog", "x"], guidance_scale=scales, seed=2, **call).images
    for k, (prompt, scale) in enumerate(zip(["a cat", "dog", "x"], scales, strict=True)):
        alone = pipeline(prompt, guidance_scale=scale, seed=2 + 2 * k, **call).images
        assert (alone - many[2 * k : 2 * k + 2]).abs().max() <= 1 / 255


@pytest.mark.parametrize("scale", [0, 0.5, 1, 1.0, [1], [0.2]])
def test_up_to_one_guidance_is_off_and_a_negative_prompt_does_nothing(
    pipeline: LatentDiffusionPipeline, scale: Any
) -> None:
    """The image is the conditional network's own; sd-turbo is drawn with 0."""
    call = {**FAST, "seed": 1, "guidance_scale": scale}
    expected = pipeline("a cat", **{**call, "guidance_scale": 1.0}).images
    sizes: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    found = pipeline("a cat", **call).images
    hook.remove()
    assert sizes == [1] * 4 and torch.equal(found, expected)
    with pytest.warns(UserWarning, match="the negative prompt 'dog' does nothing"):
        assert torch.equal(pipeline("a cat", negative_prompt="dog", **call).images, expected)


def test_scales_up_to_one_among_others(pipeline: LatentDiffusionPipeline) -> None:
    call: dict[str, Any] = {**FAST, "seed": 2}
    given = {"guidance_scale": [0, 4, 1], "negative_prompt": ["", "pain", "dog"]}
    with pytest.warns(UserWarning, match="the negative prompt 'dog' does nothing") as told:
        many = pipeline(["a cat", "dog", "x"], **given, **call).images
    assert len(told) == 1
    off = {**call, "guidance_scale": 1}
    alone = [
        pipeline("a cat", **off),
        pipeline("dog", guidance_scale=4, negative_prompt="pain", **{**call, "seed": 3}),
        pipeline("x", **{**off, "seed": 4}),
    ]
    for one, expected in zip(many, alone, strict=True):
        assert (one - expected.images[0]).abs().max() <= 1 / 255


def test_a_start_at_the_clean_end_is_warned_of(pipeline: LatentDiffusionPipeline) -> None:
    late = "starts at timestep (0|1|100), where the network expects more image than noise"
    for more in (
        {"num_inference_steps": 1, "timestep_spacing": "leading", "sampler": "ddim"},
        {"num_inference_steps": 1, "timestep_spacing": "linspace", "sampler": "euler"},
        {"timesteps": [100, 50]},
    ):
        with pytest.warns(UserWarning, match=late):
            pipeline("a cat", **{**FAST, **more})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("a cat", **{**FAST, "num_inference_steps": 1, "timestep_spacing": "trailing"})
        x_100 = torch.zeros(1, 4, 16, 16)  # one's own start, such as an image with some noise
        pipeline("a cat", **{**FAST, "timesteps": [100, 50], "latents": x_100})


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras", "ays"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_grid_by_name(
    pipeline: LatentDiffusionPipeline, sampler: str, spacing: str
) -> None:
    call = {**FAST, "output_type": "latent", "guidance_scale": 1}
    found = pipeline("a cat", sampler=sampler, timestep_spacing=spacing, **call).images
    assert found.isfinite().all()


def test_a1111_names_carry_their_grid(pipeline: LatentDiffusionPipeline) -> None:
    named = pipeline("a cat", seed=1, sampler="DPM++ 2M Karras", **FAST).images
    call = {**FAST, "seed": 1, "timestep_spacing": "karras"}
    assert torch.equal(named, pipeline("a cat", sampler="dpmpp_2m", **call).images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": [3, 4]}, "one for each of the 1 prompts; got 2"),
        ({"guidance_scale": "3"}, "guidance_scale must be a number"),
        ({"guidance_interval": (900, 100)}, "guidance_interval must be two timesteps"),
        ({"guidance_interval": 3}, "guidance_interval must be two timesteps"),
        ({"timesteps": [100, 200]}, "timesteps must decrease strictly"),
        ({"timesteps": [1000, 200]}, "timesteps must lie above -1"),
        ({"prompt": 3}, "prompt must be a text or a list of texts; got 3"),
        ({"prompt": []}, "at least one text"),
        ({"prompt": ["a", None]}, "prompt must be a text"),
        ({"negative_prompt": ["a", "b"]}, "one for each of the 1 prompts; got 2"),
        ({"height": 33}, r"multiples of 2.*got 33\. The nearest is 32"),
        ({"width": -2}, "multiples of 2"),
        ({"height": 0}, r"multiples of 2.*got 0\. The nearest is 2"),
        ({"width": 0}, "multiples of 2"),
        ({"height": 32.0}, r"height and width must be whole numbers; got 32\.0"),
        ({"width": "32"}, "must be whole numbers; got '32'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"sampler": ""}, "sampler must be one of"),
        ({"timestep_spacing": ""}, "timestep_spacing must be one of"),
        ({"timesteps": []}, "timesteps must decrease strictly and not be empty"),
        ({"sampler": "dddim"}, "Did you mean 'ddim'"),
        ({"sampler_options": {"etaa": 1.0}}, "Did you mean 'eta'"),
        ({"timestep_spacing": "trailling"}, "Did you mean 'trailing'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": 1001}, "1 … 1000 for .* spacing; got 1001"),
        ({"guidance_scale": -1}, "guidance_scale must be a number of at least 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number from 0 to .* Leave it out"),
        ({"seed": 2**64}, r"seed must be a whole number from 0 to 2\^64 - 1"),
        ({"seed": 2**64 - 1, "num_images_per_prompt": 3}, r"0 to 2\^64 - 3, the number of images"),
        ({"guidance_interval": (float("nan"), float("nan"))}, "guidance_interval must be two"),
        ({"guidance_rescale": 2}, "guidance_rescale must be a number in 0 … 1; got 2"),
        ({"guidance_rescale": None}, "guidance_rescale must be a number"),
        ({"sampler_options": [1]}, "sampler_options must be names and values"),
        ({"sampler_options": {"eta": "1"}}, "eta must lie in 0 … 1; got '1'"),
        ({"timesteps": 5}, "timesteps must be numbers; got 5"),
        ({"latents": "noise"}, r"latents must be a tensor \(1, 4, 16, 16\); got 'noise'"),
        ({"output_type": "pill"}, "Did you mean 'pil'"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"\(1, 4, 16, 16\).*got \(1, 4, 8, 8\)"),
    ],
)
def test_bad_input(
    pipeline: LatentDiffusionPipeline, arguments: dict[str, Any], message: str
) -> None:
    hook = pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    try:
        with pytest.raises(UserError, match=message):
            pipeline(**{"prompt": "a cat", **FAST, **arguments})
    finally:
        hook.remove()


def test_seeds_have_64_bits_and_every_one_that_comes_back_can_be_given(
    pipeline: LatentDiffusionPipeline,
) -> None:
    first = 2**64 - 2
    both = pipeline("a cat", **FAST | {"seed": first, "num_images_per_prompt": 2})
    assert both.seeds == [first, first + 1]
    again = pipeline("a cat", **FAST | {"seed": both.seeds[1]})
    assert (again.images[0] - both.images[1]).abs().max() <= 1 / 255
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(first + 1))
    assert torch.equal(image_noise(first + 1, (4, 16, 16)), noise)


def test_half_precision_keeps_the_autoencoder_float32(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path)
    half = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (half.unet.dtype, half.autoencoder.dtype) == (torch.bfloat16, torch.float32)
    found = half("a cat", seed=0, **FAST).images
    assert torch.isfinite(found).all() and found.std() > 0.02
    assert half.to("cpu", torch.float32).unet.dtype == torch.float32


def test_missing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not exist"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "nothing")
    monkeypatch.setattr("latentdiff.pipelines.generate.EMBEDDED_MODEL", tmp_path / "none")
    with pytest.raises(UserError, match="no embedded model"):
        LatentDiffusionPipeline.from_pretrained()
