"""colorize, upscale and restore: what of the input stays, with a model that knows nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffusionPipeline
from latentdiff.colour import to_lab
from latentdiff.diffusion.operators import Blur, Downsample
from latentdiff.errors import UserError
from tests.random_models import make_pipeline

CALL: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "progress": False}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionPipeline:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return LatentDiffusionPipeline.from_pretrained(folder)


def drawing(size: tuple[int, int] = (50, 70), seed: int = 0) -> Image.Image:
    """Flat colours with sharp edges; much of it is black or white."""
    random = np.random.default_rng(seed)
    colours = np.vstack([random.integers(0, 256, (5, 3)), [[0] * 3], [[255] * 3] * 2])
    pixels = colours[random.integers(0, 8, (7, 5))].astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in 0 … 255, float64."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].double()


def image(pixels: torch.Tensor) -> Image.Image:
    rounded = pixels[0].permute(1, 2, 0).round().clamp(0, 255)
    return Image.fromarray(rounded.numpy().astype(np.uint8))


def as_jpeg(one: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    one.save(file, "JPEG", quality=quality)
    return Image.open(file)


def farthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("prompt", ["", "cat"])
def test_colorize_keeps_lightness_whatever_the_mode(pipeline: Any, prompt: str) -> None:
    grey = as_jpeg(drawing().convert("L"), 90)
    found = pipeline.colorize(grey, prompt, **CALL).images[0]
    assert found.size == (50, 70)
    lightness = [to_lab(tensor(one) / 255)[:, 0] for one in (grey, found)]
    assert farthest(*lightness) <= 100 / 255
    assert to_lab(tensor(found) / 255)[:, 1:].abs().mean() > 1  # it has colours
    again = pipeline.colorize(grey.convert("RGB"), prompt, **CALL).images[0]
    assert farthest(tensor(found), tensor(again)) == 0


def test_a_large_image_is_coloured_as_a_whole_at_the_size_of_the_training(pipeline: Any) -> None:
    seen = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    found = pipeline.colorize(drawing((128, 96)), **CALL).images[0]
    hook.remove()
    assert found.size == (128, 96)
    assert {tuple(shape) for shape in seen} == {(1, 4, 12, 16)}  # of 24x32 pixels


def test_colours_that_an_image_has_do_not_count(pipeline: Any) -> None:
    """Another hue of the same lightness, to within what rounding does."""
    found = pipeline.colorize(drawing(), **CALL).images[0]
    lightness = [to_lab(tensor(one) / 255)[:, 0] for one in (drawing(), found)]
    assert farthest(*lightness) <= 100 / 255


@pytest.mark.parametrize(("size", "scale"), [((33, 47), 2), ((16, 9), 4), ((40, 30), 3)])
def test_upscale_made_smaller_is_the_input(
    pipeline: Any, size: tuple[int, int], scale: int
) -> None:
    given = drawing(size)
    found = pipeline.upscale(given, scale, **CALL).images[0]
    assert found.size == (size[0] * scale, size[1] * scale)
    smaller = Downsample((found.height, found.width), (given.height, given.width))
    assert farthest(smaller.apply(tensor(found)), tensor(given)) <= 1
    pillow = found.resize(size, Image.Resampling.BOX)  # rounded to 8 bit
    assert farthest(tensor(pillow), tensor(given)) <= 1


@pytest.mark.parametrize("blur", [0.8, 1.5])
def test_deblur_blurred_is_the_input(pipeline: Any, blur: float) -> None:
    operator = Blur((70, 50), blur)
    given = image(operator.apply(tensor(drawing())))
    found = pipeline.restore(given, "deblur", blur=blur, **CALL).images[0]
    assert farthest(operator.apply(tensor(found)), tensor(given)) <= 1


@pytest.mark.parametrize("quality", [10, 30])
def test_jpeg_compressed_again_is_the_input(pipeline: Any, quality: int) -> None:
    """Its brightness; libjpeg's own decoder smooths the colours, ours doesn't."""
    given = as_jpeg(drawing((48, 64)), quality)
    found = pipeline.restore(given, "jpeg", quality=quality, **CALL).images[0]
    assert farthest(tensor(found), tensor(given)) > 2
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    off = ((tensor(as_jpeg(found, quality)) - tensor(given)) * luma).sum(1)
    before = ((tensor(found) - tensor(given)) * luma).sum(1)
    assert off.abs().mean() < 0.5 * before.abs().mean()


@pytest.mark.parametrize("noise", [0.1, 0.2])
def test_denoise_takes_off_what_was_said(pipeline: Any, noise: float) -> None:
    clean = tensor(drawing())
    given = image(clean + 255 * noise * torch.randn(clean.shape).double())
    found = pipeline.restore(given, "denoise", noise=noise, **CALL).images[0]
    taken = (tensor(given) - tensor(found))[(tensor(given) > 0) & (tensor(given) < 255)]
    assert 0.9 * noise <= taken.square().mean().sqrt() / 255 <= 1.1 * noise


@pytest.mark.parametrize("kind", ["denoise", "deblur", "jpeg"])
def test_grey_stays_grey(pipeline: Any, kind: str) -> None:
    grey = drawing().convert("L")
    found = pipeline.restore([grey, drawing(seed=1)], kind, **CALL).images
    colours = [np.ptp(np.array(one).astype(int), axis=2).max() for one in found]
    assert colours[0] <= 2 < colours[1]
    rgb = pipeline.restore([grey.convert("RGB"), drawing(seed=1)], kind, **CALL).images
    assert farthest(tensor(found[0]), tensor(rgb[0])) == 0


@pytest.mark.parametrize("task", ["colorize", "upscale", "restore"])
def test_opacity_is_kept(pipeline: Any, task: str) -> None:
    given = drawing((33, 47)).convert("RGBA")
    given.paste((0, 0, 0, 0), (0, 0, 12, 12))
    found = getattr(pipeline, task)(given, **CALL).images[0]
    factor = 2 if task == "upscale" else 1
    assert found.mode == "RGBA" and found.size == (33 * factor, 47 * factor)
    opacity = np.array(found)[..., 3]
    assert opacity[6 * factor, 6 * factor] == 0 and opacity[30 * factor, 25 * factor] == 255


@pytest.mark.parametrize("task", ["colorize", "upscale", "restore"])
def test_alone_and_in_any_batch(pipeline: Any, task: str) -> None:
    call = {**CALL, "num_images_per_prompt": 2}
    given = [drawing((20, 30), seed) for seed in (1, 2)]
    one, four = (getattr(pipeline, task)(given, batch_size=n, **call).images for n in (1, 4))
    assert max(farthest(tensor(a), tensor(b)) for a, b in zip(one, four, strict=True)) <= 1


def test_each_image_is_denoised_from_its_own_level(pipeline: Any) -> None:
    """What noise does to the latents differs from image to image, and so do their timesteps."""
    random = np.random.default_rng(0)
    grain = Image.fromarray(random.integers(0, 256, (48, 32, 3), dtype=np.uint8))
    flat = Image.new("RGB", (32, 48), (120, 130, 90))
    call = {**CALL, "noise": 0.2, "num_inference_steps": 300}
    alone = [pipeline.restore(one, **(call | {"seed": seed})) for one, seed in
             ((flat, 1), (grain, 2))]  # fmt: skip
    together = pipeline.restore([flat, grain], **call)
    assert alone[0].steps != alone[1].steps
    assert [one["steps_run"] for one in together.settings] == [one.steps for one in alone]
    assert all(one["timesteps"] is None for one in together.settings)
    for one, other in zip(alone, together.images, strict=True):
        assert farthest(tensor(one.images[0]), tensor(other)) <= 1


@pytest.mark.parametrize("size", [(48, 12), (10, 12), (17, 16)], ids=["three", "less", "and one"])
def test_tiles_have_no_seams(
    pipeline: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that sees each position by itself, in tiles of 32 pixels and of 1024."""
    monkeypatch.setattr(pipeline.unet, "forward", lambda x_t, t, kv: x_t)
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[::-1])
    gradient, found = Image.fromarray(ramp.astype(np.uint8)), []
    for tile in (32, 1024):
        monkeypatch.setattr(LatentDiffusionPipeline, "default_size", (tile, tile))
        found.append(pipeline.upscale(gradient, 2, **CALL).images[0])
    assert farthest(*map(tensor, found)) <= 1


def test_tiles_of_a_network_that_inpaints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each tile is given the channels of its own size: of these none is kept."""
    make_pipeline(in_channels=9).save_pretrained(tmp_path)
    pipeline: Any = LatentDiffusionPipeline.from_pretrained(tmp_path)
    vae, seen = pipeline.autoencoder, list[torch.Tensor]()
    wanted = vae.all_masked((32, 32))

    def forward(x_t: torch.Tensor, t: Any, kv: Any) -> torch.Tensor:
        seen.append(x_t[:, 4:])
        return x_t[:, :4]

    monkeypatch.setattr(pipeline.unet, "forward", forward)
    for task in ("upscale", "restore"):
        getattr(pipeline, task)(drawing((70, 32)), **CALL)
    assert len({extra.shape for extra in seen}) == 1
    for extra in seen:
        torch.testing.assert_close(extra, wanted.expand_as(extra))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("upscale", {"scale": 1}, "above 1"),
        ("upscale", {"scale": float("nan")}, "above 1"),
        ("upscale", {"scale": 1000}, "enlarged size"),
        ("upscale", {"scale": float("inf")}, "above 1"),
        ("upscale", {"scale": 1e308}, "enlarged size"),
        ("upscale", {"strength": -0.1}, "strength"),
        ("restore", {"kind": "denoize"}, "Did you mean 'denoise'"),
        ("restore", {"strength": 2}, "strength must be"),
        ("restore", {"noise": 0}, "noise must be a number in"),
        ("restore", {"kind": "deblur", "blur": -1}, "blur must be a number in"),
        ("restore", {"kind": "jpeg", "quality": 0}, "quality must be a whole number in 1 … 100"),
        ("restore", {"kind": "jpeg", "quality": 30.5}, "whole number"),
        ("restore", {"num_inference_steps": 0}, "num_inference_steps"),
    ],
)
def test_errors_name_what_is_allowed(
    pipeline: Any, task: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        getattr(pipeline, task)(drawing(), **{**CALL, **options})
