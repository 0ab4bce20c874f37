"""Painting into images and beyond them, as a caller of the pipeline does it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import UserError
from latentdiff.pipelines.masks import surrounded
from tests.random_models import make_pipeline

FAST: dict[str, Any] = {"num_inference_steps": 2, "seed": 5, "progress": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, Any]]:
    """Theirs and ours by input channels: 4, and 9 with a mask and the masked image."""
    found = {}
    for channels in (4, 9):
        theirs = make_pipeline(scheduler=scheduler(), in_channels=channels)
        folder = tmp_path_factory.mktemp(f"model{channels}")
        inpainting(theirs).save_pretrained(folder)
        found[channels] = theirs, LatentDiffusionPipeline.from_pretrained(folder)
    return found


@pytest.fixture
def pipeline(models: dict[int, tuple[Any, Any]]) -> LatentDiffusionPipeline:
    return models[4][1]


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def inpainting(theirs: Any, kind: str = "StableDiffusionInpaintPipeline") -> Any:
    import diffusers

    parts = {name: part for name, part in theirs.components.items() if name != "image_encoder"}
    made = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def colours(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Random coarse colours of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def box(size: tuple[int, int], *where: int) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, where)
    return mask


def soft(size: tuple[int, int]) -> Image.Image:
    """Irregular, soft, and touching two borders."""
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    draw.ellipse((-10, 5, size[0] // 2, size[1] // 2), fill=255)
    draw.line((size[0] // 3, 0, size[0] // 2, size[1] // 2), fill=200, width=5)
    return mask.filter(ImageFilter.GaussianBlur(2))


@pytest.fixture
def no_posterior_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their encoder draws from its posterior; ours takes the mean, so that images differ less."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )


SOLVERS = {"ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}


@pytest.mark.usefixtures("no_posterior_noise")
@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize(
    ("task", "strength"),
    [
        ("image_to_image", 0.6),  # at 1 theirs still begins from the image
        ("inpaint 4", 1.0),
        ("inpaint 4", 0.6),
        ("inpaint 9", 1.0),
        ("inpaint 9", 0.6),
    ],
)
def test_as_diffusers(
    task: str, sampler: str, strength: float, models: dict[int, tuple[Any, Any]]
) -> None:
    """Before anything is put over it: the same image from the same noise."""
    import diffusers

    parts, ours = models[9 if task == "inpaint 9" else 4]
    image, mask = colours((40, 48)), box((40, 48), 8, 0, 26, 30)
    call: dict[str, Any] = {
        "num_inference_steps": 8, "guidance_scale": 4.0, "negative_prompt": "dog",
        "strength": strength,
    }  # fmt: skip
    if task == "image_to_image":
        theirs = inpainting(parts, "StableDiffusionImg2ImgPipeline")
        method: Callable[..., Any] = ours.image_to_image
        given: dict[str, Any] = {"image": image}
    else:
        theirs, method = inpainting(parts), ours.inpaint
        given = {"image": image, "mask_image": mask}
    theirs.scheduler = getattr(diffusers, SOLVERS[sampler]).from_config(parts.scheduler.config)
    size = {} if task == "image_to_image" else {"height": 48, "width": 40}
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        expected = theirs("a cat", **given, **call, **size, generator=generator, output_type="pt")
        found = method(
            "a cat", **given, **call, seed=seed, sampler=sampler, output_type="latent",
            progress=False,
        )  # fmt: skip
        with torch.no_grad():
            pixels = (ours.autoencoder.decode(found.images) / 2 + 0.5).clamp(0, 1)
        assert (pixels - expected.images).abs().max() * 255 <= 2
        assert pixels.std() * 255 > 20 and found.steps == int(8 * strength)


MASKS: dict[str, Callable[[tuple[int, int]], Image.Image]] = {
    "box": lambda size: box(size, 8, 8, 24, 24),
    "at the border": lambda size: box(size, size[0] - 7, 0, size[0], 13),
    "soft": soft,
}


@pytest.mark.parametrize(
    ("channels", "size"),
    [(4, (65, 50)), (4, (100, 61)), (4, (9, 31)), (9, (64, 64)), (9, (65, 50))],
)
@pytest.mark.parametrize("mask", MASKS)
def test_nothing_outside_the_mask_changes(
    channels: int, mask: str, size: tuple[int, int], models: dict[int, tuple[Any, Any]]
) -> None:
    image, painted = noise(size), MASKS[mask](size)
    edited, outside = image, np.asarray(painted) == 0
    for _ in range(5):
        call = {**FAST, "guidance_scale": 1.0}
        edited = models[channels][1].inpaint("a cat", edited, painted, **call).images[0]
    before, after = np.asarray(image), np.asarray(edited)
    assert before.shape == after.shape
    assert (before == after)[outside].all()
    inside = np.asarray(painted) > 128
    assert (before != after).any(-1)[inside].mean() > 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"mask_blur": 3},
        {"padding_mask_crop": 0},
        {"padding_mask_crop": 6, "mask_blur": 2},
        {"strength": 0.5, "sampler": "euler_ancestral"},
        {"strength": 0.5, "sampler": "dpmpp_2m_sde", "output_type": "np"},
    ],
)
def test_nothing_beyond_the_blur_changes(
    options: dict[str, Any], pipeline: LatentDiffusionPipeline
) -> None:
    image = noise((64, 50)).convert("RGBA")
    image.paste((9, 99, 199, 0), (0, 30, 20, 50))
    image.paste((9, 99, 199, 77), (50, 0, 64, 20))
    mask = box((64, 50), 0, 0, 12, 30)
    found = pipeline.inpaint("a cat", image, mask, **FAST, **options).images[0]
    pixels = np.rint(np.asarray(found) * (255 if options.get("output_type") else 1))
    distance = (
        np.maximum(np.arange(64) - 11, 0)[None] ** 2
        + np.maximum(np.arange(50) - 29, 0)[:, None] ** 2
    )
    beyond = distance > (3 * options.get("mask_blur", 0)) ** 2
    assert (pixels[beyond] == np.asarray(image)[beyond]).all()
    assert (pixels[np.asarray(mask) > 0, 3] == 255).all()
    assert (pixels[..., :3] != np.asarray(image)[..., :3]).any(-1)[
        np.asarray(mask) > 0
    ].mean() > 0.9


def test_the_padding_of_the_masked_area_matters(pipeline: LatentDiffusionPipeline) -> None:
    image, mask = colours((96, 80)), box((96, 80), 88, 72, 96, 80)
    found = [
        np.asarray(pipeline.inpaint("a cat", image, mask, padding_mask_crop=p, **FAST).images[0])
        for p in (0, 32, None)
    ]
    for one in found:
        changed = (one != np.asarray(image)).any(-1)
        assert changed[72:, 88:].any() and not changed[:72].any() and not changed[:, :88].any()
    assert (found[0] != found[1]).any() and (found[1] != found[2]).any()


def test_fill_begins_from_what_is_around_the_mask(pipeline: LatentDiffusionPipeline) -> None:
    mask = box((40, 30), 7, 5, 25, 21)
    images = [colours((40, 30))] * 2
    images[1] = images[1].copy()
    images[1].paste((255, 0, 9), (7, 5, 25, 21))
    call: dict[str, Any] = {"mask_image": mask, "strength": 0.5, "mask_blur": 2, **FAST}

    def painted(image: Image.Image, **more: Any) -> Any:
        return np.asarray(pipeline.inpaint("a cat", image, **call, **more).images[0])

    assert (painted(images[0], fill=True) == painted(images[1], fill=True)).all()
    assert (painted(images[0]) != painted(images[1])).any()
    call["strength"] = 0.0
    assert (painted(images[1], fill=True) == np.asarray(images[1])).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (37, 50), (64, 32)])
def test_what_is_masked_is_replaced_by_the_colours_around_it(size: tuple[int, int]) -> None:
    plain = torch.tensor([0.25, -0.5, 1.0])[None, :, None, None].expand(2, 3, *size)
    mask = torch.zeros(2, 1, *size)
    mask[0, :, size[0] // 3 :, size[1] // 3 :] = 1  # all of it in the smallest
    mask[1, :, ::2] = 0.5
    other = torch.where(mask == 1, torch.randn(2, 3, *size), plain)
    filled = surrounded(other, mask)
    known = mask < 1
    where = (known | known.flatten(1).any(1)[:, None, None, None]).expand(-1, 3, -1, -1)
    torch.testing.assert_close(filled[where], plain[where])
    # From a border at -1 to one at 1 there is nothing outside that range, and both are met.
    ramp = torch.cat(
        [-torch.ones(1, 1, 16, 4), torch.zeros(1, 1, 16, 8), torch.ones(1, 1, 16, 4)], 3
    )
    between = surrounded(ramp, (ramp == 0).float())[0, 0]
    assert (between.abs() <= 1).all() and (between.diff(dim=1) >= 0).all()
    assert between[8, 4] < -0.3 and between[8, 11] > 0.3


def test_without_a_mask_the_transparent_part_is_painted(pipeline: LatentDiffusionPipeline) -> None:
    image = colours((40, 32)).convert("RGBA")
    image.paste((0, 255, 0, 0), (0, 0, 17, 32))
    found = pipeline.inpaint("a cat", image, **FAST).images[0]
    assert found.mode == "RGB" and found.size == (40, 32)
    assert (np.asarray(found)[:, 17:] == np.asarray(image)[:, 17:, :3]).all()
    assert (np.asarray(found)[:, :17] != (0, 255, 0)).any(-1).mean() > 0.9
    hidden = Image.new("RGBA", (40, 32))
    hidden.paste(image, (0, 0), image.getchannel("A"))
    again = pipeline.inpaint("a cat", hidden, **FAST).images[0]
    assert (np.asarray(again) == np.asarray(found)).all()  # hidden colours play no part


@pytest.mark.parametrize("strength", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize(
    "sides",
    [{"left": 7}, {"right": 1}, {"top": 40}, {"left": 3, "right": 9, "top": 2, "bottom": 11}],
)
def test_outpaint_adds_pixels_and_keeps_the_image(
    sides: dict[str, int], strength: float, pipeline: LatentDiffusionPipeline
) -> None:
    image = noise((33, 26))
    output = pipeline.outpaint("a cat", image, strength, **sides, **FAST)
    found, left, top = output.images[0], sides.get("left", 0), sides.get("top", 0)
    width, height = 33 + left + sides.get("right", 0), 26 + top + sides.get("bottom", 0)
    assert found.size == (width, height) and output.steps == (strength > 0) + (strength == 1)
    assert (np.asarray(found.crop((left, top, left + 33, top + 26))) == np.asarray(image)).all()


def test_strength_at_its_ends(pipeline: LatentDiffusionPipeline) -> None:
    image = noise((21, 30)).convert("RGBA")
    image.putalpha(colours((21, 30)).convert("L"))
    for method, more in (
        (pipeline.image_to_image, {}),
        (pipeline.inpaint, {"mask_image": soft((21, 30))}),
    ):
        for seed in (1, 2):
            output = method("a cat", image, strength=0, **more, **{**FAST, "seed": seed})
            assert output.steps == 0
            assert (np.asarray(output.images[0]) == np.asarray(image)).all()
    steps = {(0.05, 15): 1, (0.8, 1): 1, (0.5, 4): 2, (1.0, 3): 3}
    for (strength, count), run in steps.items():
        call = {**FAST, "num_inference_steps": count}
        assert pipeline.image_to_image("a cat", image, strength, **call).steps == run
    black, white = (
        pipeline.image_to_image("a cat", Image.new("RGB", (24, 20), c), 1.0, **FAST).images[0]
        for c in ("black", "white")
    )
    assert (np.asarray(black) == np.asarray(white)).all()
    text = pipeline("a cat", height=20, width=24, **FAST).images[0]
    assert (np.asarray(black) == np.asarray(text)).all()


def test_more_strength_keeps_less(
    pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exact denoiser of latents N(0, ½² I): it forgets by as much as noise was added."""

    def forward(x_t: torch.Tensor, t: torch.Tensor, kv: Any) -> torch.Tensor:
        alpha, sigma = (
            level.float()[:, None, None, None]
            for level in (pipeline.schedule.alpha(t), pipeline.schedule.sigma(t))
        )
        return sigma / (alpha**2 / 4 + sigma**2) * x_t

    monkeypatch.setattr(pipeline.unet, "forward", forward)
    image = colours((32, 32))
    call = {**FAST, "num_inference_steps": 20, "num_images_per_prompt": 8, "output_type": "latent"}
    given = pipeline.image_to_image("a", image, 0, **call).images
    off = [
        float((pipeline.image_to_image("a", image, s, **call).images - given).square().mean())
        for s in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    assert off == sorted(off) and off[0] < 0.1 * off[-1]


@pytest.mark.parametrize("channels", [4, 9])
def test_an_image_is_the_same_alone_in_batches_and_from_threads(
    channels: int, models: dict[int, tuple[Any, Any]]
) -> None:
    pipeline, image, mask = models[channels][1], colours((30, 32)), soft((30, 32))
    call = {**FAST, "sampler": "euler_ancestral"}

    def draw(seed: int, count: int, batch: int = 8) -> list[np.ndarray]:
        images = pipeline.inpaint(
            "a cat", image, mask, num_images_per_prompt=count, batch_size=batch,
            **{**call, "seed": seed},
        ).images  # fmt: skip
        return [np.asarray(one, int) for one in images]

    together, halves = draw(5, 8), draw(5, 8, batch=4)
    for k in (0, 3, 7):
        (alone,) = draw(5 + k, 1)
        assert np.abs(together[k] - alone).max() <= 1 and np.abs(halves[k] - alone).max() <= 1
    assert np.abs(together[0] - together[1]).mean() > 1
    serial = [draw(seed, 1) for seed in (5, 6, 7, 8)]
    with ThreadPoolExecutor(2) as pool:
        parallel = list(pool.map(lambda seed: draw(seed, 1), (5, 6, 7, 8)))
    assert np.array_equal(serial, parallel)


def test_one_image_and_mask_for_each_prompt(pipeline: LatentDiffusionPipeline) -> None:
    images = [colours((32, 24)), colours((32, 24), 1).convert("RGBA")]
    masks = [box((32, 24), 0, 0, 9, 9), soft((32, 24))]
    prompts = ["a cat", "pain pain dog"]
    together = pipeline.inpaint(prompts, images, masks, num_images_per_prompt=2, **FAST).images
    assert [one.mode for one in together] == ["RGBA"] * 4
    for k, one in enumerate(together):
        own = {**FAST, "seed": 5 + k}
        alone = pipeline.inpaint(prompts[k // 2], images[k // 2], masks[k // 2], **own).images[0]
        assert np.abs(np.asarray(one, int) - np.asarray(alone.convert("RGBA"), int)).max() <= 1


def test_words_loras_and_long_prompts_as_in_text_to_image(
    models: dict[int, tuple[Any, Any]], tmp_path: Path
) -> None:
    from latentdiff.formats.embedding import write_embedding
    from latentdiff.formats.lora import write_lora
    from latentdiff.models.low_rank import LowRank
    from tests.random_models import TEXT_WIDTH

    torch.manual_seed(0)
    pipeline, image, mask = models[4][1], colours((32, 32)), box((32, 32), 0, 0, 20, 20)
    change = LowRank(torch.randn(2, 32), torch.randn(32, 2), 2.0)
    write_lora(tmp_path / "style.safetensors", {"unet.mid_block.attentions.0.proj_in": change})
    word = write_embedding(tmp_path / "w.safetensors", "<w>", 9 * torch.ones(2, TEXT_WIDTH))

    def draw(prompt: str) -> np.ndarray:
        call = {**FAST, "prompt_syntax": "a1111"}
        return np.asarray(pipeline.inpaint(prompt, image, mask, **call).images[0])

    plain = draw("a cat")
    assert (draw("a cat " + "dog " * 30) != plain).any()
    pipeline.load_embedding(word)
    assert (draw("a cat <w>") != plain).any()
    pipeline.load_lora(tmp_path / "style.safetensors")
    assert (draw("a cat") != plain).any()
    pipeline.unload_lora()
    assert (draw("a cat") == plain).all()


IMAGE, MASK = Image.new("RGB", (96, 64)), box((96, 64), 8, 8, 24, 24)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("image_to_image", {"strength": -0.1}, "strength must be a number in 0 … 1; got -0.1"),
        ("image_to_image", {"strength": float("nan")}, "strength must be a number in 0 … 1"),
        ("image_to_image", {"image": Image.new("RGB", (0, 9))}, "at least 1 in both directions"),
        ("image_to_image", {"image": "nothing.png"}, "nothing.png: the file does not exist"),
        ("image_to_image", {"image": [IMAGE] * 2, "prompt": ["a"] * 3}, "one for each of the 2"),
        ("inpaint", {}, "needs mask_image"),
        ("inpaint", {"mask_image": Image.new("L", (50, 50), 9)}, "96x64 .* got 50x50"),
        ("inpaint", {"mask_image": Image.new("L", (96, 64))}, "nothing to paint"),
        ("inpaint", {"mask_image": MASK, "strength": 2}, "strength must be"),
        ("inpaint", {"mask_image": MASK, "mask_blur": -1}, "mask_blur must be a whole number"),
        ("inpaint", {"mask_image": MASK, "mask_blur": 10**9}, "in 0 … 256"),
        ("inpaint", {"mask_image": MASK, "padding_mask_crop": 0.5}, "padding_mask_crop must be"),
        ("inpaint", {"mask_image": MASK, "sampler": "dim"}, "Did you mean 'ddim'"),
        ("outpaint", {}, "at least one of left, right, top, bottom"),
        ("outpaint", {"left": -8}, "left must be a whole number of pixels in 0 …"),
        ("outpaint", {"left": 8, "top": 1.5}, "top must be a whole number"),
        ("outpaint", {"right": 10**6}, "16,777,216 pixels"),
        ("variations", {"strength": "much"}, "strength must be"),
        ("interpolate", {}, "at least two prompts or two seeds"),
        ("interpolate", {"prompt": ["a", "b", "c"], "frames": 2}, "as many frames"),
        ("interpolate", {"prompt": ["a", "b"], "frames": 10**9}, "up to 9999"),
        ("interpolate", {"prompt": ["a", "b"], "seed": [1, 2, 3]}, "one for each of the 3"),
        ("interpolate", {"prompt": ["a", "b"], "seed": [1, -2]}, "seed must be a whole number"),
    ],
)
def test_mistakes_are_named(
    method: str, arguments: dict[str, Any], message: str, pipeline: LatentDiffusionPipeline
) -> None:
    given = {"prompt": "a cat", **({} if method == "interpolate" else {"image": IMAGE})}
    with pytest.raises(UserError, match=message):
        getattr(pipeline, method)(**{**given, **FAST, **arguments})


def test_a_full_mask_works_with_a_note(pipeline: LatentDiffusionPipeline) -> None:
    with pytest.warns(UserWarning, match="nothing of the image is kept"):
        found = pipeline.inpaint("a cat", IMAGE, Image.new("L", (96, 64), 255), **FAST).images[0]
    text = pipeline("a cat", height=64, width=96, **FAST).images[0]
    assert np.abs(np.asarray(found, int) - np.asarray(text, int)).max() <= 1


def test_an_inpainting_model_draws_without_a_mask_as_with_a_full_one(
    models: dict[int, tuple[Any, Any]],
) -> None:
    pipeline = models[9][1]
    with pytest.warns(UserWarning, match="nothing of the image is kept"):
        full = pipeline.inpaint("a cat", IMAGE, Image.new("L", (96, 64), 255), **FAST).images[0]
    text = pipeline("a cat", height=64, width=96, **FAST).images[0]
    assert np.abs(np.asarray(full, int) - np.asarray(text, int)).max() <= 1
    assert pipeline.outpaint("a cat", IMAGE, left=9, **FAST).images[0].size == (105, 64)


def test_frames_lead_from_one_image_to_the_next(
    pipeline: LatentDiffusionPipeline, tmp_path: Path
) -> None:
    from latentdiff.images import save_animation

    call = {**FAST, "height": 32, "width": 24}
    prompts, seeds = ["a cat", "pain pain dog", "a cat"], [5, 6, 9]
    output = pipeline.interpolate(prompts, 5, **{**call, "seed": seeds})
    frames = [np.asarray(frame, int) for frame in output.images]
    for k, place in enumerate((0, 2, 4)):
        alone = pipeline(prompts[k], **{**call, "seed": seeds[k]}).images[0]
        assert np.abs(frames[place] - np.asarray(alone, int)).max() <= 1
    assert all(np.abs(a - b).mean() > 1 for a, b in itertools.pairwise(frames))
    each = {"negative_prompt": ["dog", "", "cat"], "guidance_scale": [3.0, 2.0, 5.0]}
    lists, tuples = (
        pipeline.interpolate(prompts, 5, **call, **{n: kind(v) for n, v in each.items()}).images
        for kind in (list, tuple)
    )
    assert [one.tobytes() for one in lists] == [one.tobytes() for one in tuples]
    still = pipeline.interpolate(prompts, 3, **call)
    assert np.abs(np.asarray(still.images[0], int) - frames[0]).max() <= 1
    file = save_animation(output.images, tmp_path / "cats.gif", 0.2)
    with Image.open(file) as animation:
        assert animation.n_frames == 5 and animation.info == animation.info | {
            "duration": 200, "loop": 0,
        }  # fmt: skip


def test_slerp_keeps_the_deviation_of_noise() -> None:
    from latentdiff.diffusion.noise import batch_noise, slerp

    first, second = batch_noise([1, 2], (4, 64, 64))
    assert torch.equal(slerp(first, second, 0.0), first)
    torch.testing.assert_close(slerp(first, second, 1.0), second)
    assert abs(float(slerp(first, second, 0.5).std()) - 1) < 0.02
    torch.testing.assert_close(slerp(first, first, 0.3), first)


@pytest.mark.parametrize(
    ("task", "size", "given", "advice"),
    [
        ("text_to_image", None, {"height": 50}, "hires_scale"),
        ("text_to_image", None, {"width": 48, "hires_scale": 2}, None),
        ("interpolate", None, {"width": 50, "frames": 2, "seed": [1, 2]}, "upscale the frames"),
        ("image_to_image", (40, 40), {}, "Reduce the image"),
        ("image_to_image", (32, 48), {}, None),
        ("image_to_image", (64, 64), {"strength": 0}, None),
        ("variations", (50, 32), {}, "Reduce the image"),
        ("inpaint", (50, 32), {"mask_image": ()}, "padding_mask_crop"),
        ("inpaint", (64, 64), {"mask_image": (), "padding_mask_crop": 2}, None),
        ("outpaint", (32, 32), {"left": 18}, "Reduce the image"),
        ("colorize", (64, 64), {}, None),
        ("restore", (64, 64), {}, None),
        ("upscale", (64, 64), {}, None),
    ],
)
def test_what_is_much_larger_than_the_training_is_warned_of(
    pipeline: Any, task: str, size: Any, given: dict[str, Any], advice: str | None
) -> None:
    """The model's is 32x32."""
    if "mask_image" in given:
        given = {**given, "mask_image": Image.new("L", size)}
        given["mask_image"].paste(255, (8, 8, 20, 20))
    image = {} if size is None else {"image": Image.new("RGB", size, "teal")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(pipeline, task)(prompt="a cat", **{**FAST, **image, **given})
    said = [str(one.message) for one in caught if "of the model's training" in str(one.message)]
    assert len(said) == (advice is not None)
    assert all(advice in one for one in said)
