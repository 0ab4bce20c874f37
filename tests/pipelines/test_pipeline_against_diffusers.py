"""The same folder, noise and sampler give the same image here and in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from tests.random_models import make_pipeline

PROMPTS = ["a cat", "pain pain dog"]
#: The second leaves to the seed what is drawn; of what is named the embedded model has one image.
#: Of a named thing the embedded model draws nearly the same with every seed.
TRAINED = ["a painting", "an image"]
CASES: dict[str, dict[str, Any]] = {
    "eps": {},
    "v, zero terminal SNR": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "x0, ends clean": {"prediction_type": "sample", "set_alpha_to_one": True},
    "x0, zero terminal SNR, text in the time embedding": {
        "prediction_type": "sample",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    },
}
TEXT_IN_TIME = {
    "resnet_time_scale_shift": "scale_shift",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 3,
}


def ddim(**changes: Any) -> Any:
    from diffusers import DDIMScheduler

    fields = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**(fields | changes))


def open_theirs(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def assert_same_images(
    theirs: Any, ours: LatentDiffusionPipeline, prompts: list[str], sampler: str | None = "ddim"
) -> None:
    """At most 2/255 apart; not flat; another seed gives another image."""
    height, width = (side // ours.autoencoder.downscale for side in ours.default_size)
    shape = (len(prompts), ours.autoencoder.latent_channels, height, width)
    images = []
    for seed in (0, 1):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        options = {
            "negative_prompt": ["dog", "a cat"],
            "num_inference_steps": 20,
            "guidance_scale": 4.0,
            "latents": noise,
        }
        expected = np.stack([np.asarray(i, int) for i in theirs(prompts, **options).images])
        found = ours(prompts, **options, sampler=sampler, progress=False).images
        images.append(np.stack([np.asarray(image, int) for image in found]))
        assert np.abs(images[-1] - expected).max() <= 2
        assert min(image.std() for image in images[-1]) >= 20
    assert np.abs(images[0] - images[1]).mean() > 5
    assert np.abs(images[0][0] - images[0][1]).mean() > 5


@pytest.mark.parametrize("case", CASES)
def test_theirs_opens_in_ours_and_ours_in_theirs(case: str, tmp_path: Path) -> None:
    unet = TEXT_IN_TIME if "text in" in case else {}
    theirs = make_pipeline(scheduler=ddim(**CASES[case]), **unet)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path / "theirs")
    assert_same_images(theirs, ours, PROMPTS)
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=300_000)
    assert_same_images(open_theirs(tmp_path / "ours"), ours, PROMPTS)


def test_tiny_autoencoder(tmp_path: Path) -> None:
    make_pipeline(vae_kind="tiny").save_pretrained(tmp_path / "theirs")
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path / "theirs")
    assert_same_images(open_theirs(tmp_path / "theirs"), ours, PROMPTS)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_images(open_theirs(tmp_path / "ours"), ours, PROMPTS)


def test_ddim_in_place_of_the_folders_solver(tmp_path: Path) -> None:
    """A folder saved with PNDM samples as diffusers does after swapping in DDIM."""
    from diffusers import DDIMScheduler, PNDMScheduler

    pndm = PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        skip_prk_steps=True,
        steps_offset=1,
    )
    theirs = make_pipeline(scheduler=pndm)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    assert_same_images(theirs, LatentDiffusionPipeline.from_pretrained(tmp_path), PROMPTS)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ],
)
def test_the_folders_solver_and_grid_are_used(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Without a sampler's name, the image is the one that diffusers makes of the folder."""
    import diffusers

    levels = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = make_pipeline(scheduler=getattr(diffusers, name)(**levels, **fields))
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert_same_images(theirs, ours, PROMPTS, sampler=None)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("EulerDiscreteScheduler", "euler"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("UniPCMultistepScheduler", "unipc"),
    ],
)
def test_another_solver_ends_at_the_clean_image_whatever_ddim_does(
    name: str, sampler: str, tmp_path: Path
) -> None:
    """Every Stable Diffusion file says set_alpha_to_one=False, which these do not know."""
    import diffusers

    theirs = make_pipeline(scheduler=ddim(timestep_spacing="leading"))
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"latents": noise, "num_inference_steps": 20, "guidance_scale": 4.0}
    expected = theirs("a cat", output_type="latent", **call).images
    found = ours("a cat", output_type="latent", progress=False, sampler=sampler, **call).images
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    call |= {"sampler": sampler, "progress": False, "output_type": "latent"}
    before = ours("a cat", sampler_options={"final_timestep": 0}, **call).images
    assert (before - expected).abs().max() > 4e-3


def test_flow_folder_opens_in_theirs(tmp_path: Path) -> None:
    from dataclasses import replace

    from latentdiff.diffusion.schedule import ScheduleConfig
    from latentdiff.formats.folder import load_components

    make_pipeline().save_pretrained(tmp_path / "theirs")
    parts = replace(
        load_components(tmp_path / "theirs"), schedule=ScheduleConfig("flow"), prediction="flow"
    )
    LatentDiffusionPipeline(parts).save_pretrained(tmp_path / "ours")
    theirs = open_theirs(tmp_path / "ours")
    image = np.asarray(theirs(PROMPTS[0], num_inference_steps=10).images[0])
    assert image.std() > 5
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "ours")
    found = again(PROMPTS[0], num_inference_steps=10, output_type="pt", progress=False).images
    assert torch.isfinite(found).all()


@pytest.mark.skipif(
    not (EMBEDDED_MODEL / "model_index.json").is_file(), reason="the embedded model is not there"
)
def test_embedded_model(tmp_path: Path) -> None:
    ours = LatentDiffusionPipeline.from_pretrained()
    assert_same_images(open_theirs(EMBEDDED_MODEL), ours, TRAINED)
    ours.save_pretrained(tmp_path / "again")
    assert_same_images(open_theirs(tmp_path / "again"), ours, TRAINED)
