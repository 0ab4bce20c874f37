"""Inpainting U-Nets: what they are given, how they are trained, what comes out of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from launching import launch  # noqa: E402
from random_models import TEXT_WIDTH, make_pipeline, make_unet, make_vae  # noqa: E402
from tiny_training import losses, make_images  # noqa: E402

from latentdiff.data.latents import build_latent_cache  # noqa: E402
from latentdiff.data.masked_images import MaskedImages, draw_mask  # noqa: E402
from latentdiff.data.online import OnlineLatents  # noqa: E402
from latentdiff.data.source import DataConfig, open_source  # noqa: E402
from latentdiff.errors import UserError  # noqa: E402
from latentdiff.finetune.inpainting import widen  # noqa: E402
from latentdiff.formats.folder import load_components  # noqa: E402
from latentdiff.formats.model import load_model, save_model  # noqa: E402
from latentdiff.models.autoencoder import Autoencoder  # noqa: E402
from latentdiff.models.unet import UNet, with_extra  # noqa: E402
from latentdiff.pipelines.generate import LatentDiffusionPipeline  # noqa: E402

STEPS = 6


@pytest.mark.parametrize("channels", [4, 8])
def test_a_widened_unet_is_what_it_was(channels: int) -> None:
    theirs = make_unet(in_channels=channels, out_channels=channels)
    unet = UNet.from_config(dict(theirs.config))
    unet.load_state_dict(theirs.state_dict())
    x_t, extra = torch.randn(3, channels, 8, 8), torch.randn(3, channels + 1, 8, 8)
    given = torch.tensor([1, 500, 999]), torch.randn(3, 5, TEXT_WIDTH)
    before = unet(x_t, *given)
    widen(unet)
    assert torch.equal(with_extra(unet, extra)(x_t, *given), before)
    other = make_unet(in_channels=2 * channels + 1, out_channels=channels)
    assert {n: t.shape for n, t in unet.state_dict().items()} == {
        n: t.shape for n, t in other.state_dict().items()
    }
    assert unet.conv_in.weight.requires_grad
    widen(unet)  # nothing is left to do
    assert unet.config.in_channels == 2 * channels + 1
    assert torch.equal(with_extra(unet, extra)(x_t, *given), before)


@pytest.fixture
def mean_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws from the posterior of a masked image; here its mean is taken."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    monkeypatch.setattr(Posterior, "sample", lambda self, generator=None: self.mode())


@pytest.mark.usefixtures("mean_latents")
def test_what_it_is_given_is_as_in_diffusers() -> None:
    from diffusers import StableDiffusionInpaintPipeline

    pipe, vae = make_pipeline(in_channels=9), make_vae()
    inpaint = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 16, 24, generator=generator) * 2 - 1
    masks = torch.rand(2, 1, 16, 24, generator=generator)
    binary = (masks >= 0.5).float()
    kept, sizes = images * (binary < 0.5), (16, 24)
    dtype, device = torch.float32, torch.device("cpu")
    with torch.no_grad():
        mask, latents = inpaint.prepare_mask_latents(
            binary, kept, 2, *sizes, dtype, device, generator, do_classifier_free_guidance=False
        )
        found = Autoencoder(vae).encode_masked(images, masks)
        blank = Autoencoder(vae).all_masked(sizes)
        grey = Autoencoder(vae).encode_masked(images[:1], torch.ones(1, 1, *sizes))
    torch.testing.assert_close(found, torch.cat([mask, latents], dim=1))
    assert torch.equal(blank, grey) and bool((blank[:, 0] == 1).all())


def test_random_masks() -> None:
    size, many = (48, 64), 2000
    masks = torch.stack([draw_mask(seed, size) for seed in range(many)])
    assert masks.dtype == torch.bool and masks.shape[1:] == size
    assert torch.equal(masks[7], draw_mask(7, size))
    covered = masks.float().mean((1, 2))
    whole = covered == 1
    assert 0.22 < float(whole.float().mean()) < 0.28  # 3 standard deviations of 25 % are 3 %
    assert float(covered.min()) > 0
    parts = masks[~whole]
    assert len({m.numpy().tobytes() for m in parts}) > 0.95 * len(parts)
    assert 0.2 < float(covered[~whole].mean()) < 0.5
    assert float(parts.float().mean(0).min()) > 0.05, "no place is never painted"
    assert float(parts.float().mean(0).max()) < 0.7
    # Outpainting: whole rows or columns from one edge on; boxes and strokes: elsewhere.
    edges = (
        parts[:, 0].all(1) | parts[:, -1].all(1) | parts[:, :, 0].all(1) | parts[:, :, -1].all(1)
    )
    assert 0.28 < float(edges.float().mean()) < 0.39
    own = torch.zeros(size, dtype=torch.bool)
    own[3:5, 7:9] = True
    drawn = [draw_mask(seed, size, own) for seed in range(many)]
    share = sum(torch.equal(mask, own) for mask in drawn) / many
    assert 0.33 < share < 0.42  # half of 75 %
    assert sum(bool(mask.all()) for mask in drawn) == int(whole.sum())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images some of which have masks, and a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("inpainting")
    make_pipeline().save_pretrained(folder / "model")
    make_images(folder / "images", 10)
    for number in range(8):
        mask = np.zeros((32, 32), np.uint8)
        mask[: 2 * number + 2] = 255
        Image.fromarray(mask).save(folder / "images" / f"{number}.mask.png")
    from train_latent import main

    assert main(given(folder, "straight")) == 0
    return folder


def given(folder: Path, name: str, *more: str, model: str = "model") -> list[str]:
    return [
        f"model.pretrained={folder / model}",
        "finetune.kind=inpainting",
        "data.kind=folder",
        f"data.path={folder / 'images'}",
        "data.inpaint_mask=true",
        "data.validation_share=0.2",
        f"latents.cache_dir={folder / 'cache'}",
        "objective.condition_dropout=0.3",
        "optimizer.lr=1e-3",
        "optimizer.warmup_steps=2",
        "loop.mixed_precision=no",
        f"loop.max_steps={STEPS}",
        "loop.batch_size=3",
        "loop.gradient_accumulation=2",
        "loop.ema_decay=0.9",
        "loop.checkpoint_every=2",
        "loop.log_every=2",
        "loop.tensorboard=false",
        "validation.every=2",
        "validation.samples=4",
        "validation.steps=2",
        "validation.images=2",
        "validation.at_start=true",
        "export.dtype=float32",
        f"output={folder / name}",
        *more,
    ]


def validation(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def test_it_starts_as_the_model_it_was_and_learns_the_new_channels(folder: Path) -> None:
    from train_latent import main

    more = ["finetune.kind=full", "data.inpaint_mask=false", "loop.max_steps=2"]
    assert main(given(folder, "plain", *more)) == 0
    ours, plain = validation(folder / "straight"), validation(folder / "plain")
    assert ours[0] == plain[0] and ours[2] != plain[2]
    trained = load_components(folder / "straight" / "model").unet
    assert trained.config.in_channels == 9
    assert float(trained.conv_in.weight[:, 4:].detach().abs().max()) > 1e-4
    images = sorted(p.name for p in (folder / "straight" / "samples").glob("*.png"))
    assert "step-00000000.png" in images


@pytest.mark.usefixtures("mean_latents")
def test_its_result_opens_in_diffusers_and_here(folder: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline

    model = folder / "straight" / "model"
    pipe = DiffusionPipeline.from_pretrained(model, safety_checker=None)
    assert isinstance(pipe, StableDiffusionInpaintPipeline)
    components = load_model(model)
    x_t, given = torch.randn(1, 9, 16, 16), (torch.tensor([400]), torch.randn(1, 16, TEXT_WIDTH))
    with torch.no_grad():
        theirs = pipe.unet(x_t, given[0], encoder_hidden_states=given[1]).sample
        torch.testing.assert_close(components.unet(x_t, *given), theirs, rtol=1e-4, atol=1e-5)
    # Text to image is inpainting where all is masked.
    latents = torch.randn(1, 4, 16, 16)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    mask, image = Image.new("L", (32, 32), 255), Image.new("RGB", (32, 32), (128, 128, 128))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a cat",
        image=image,
        mask_image=mask,
        latents=latents,
        strength=1.0,
        height=32,
        width=32,
        **options,
    ).images
    ours = LatentDiffusionPipeline(components)
    found = ours("a cat", latents=latents, progress=False, **options).images
    assert np.abs(found - expected).max() <= 2 / 255
    inverted = ours.invert(Image.new("RGB", (32, 32)), num_inference_steps=2, iterations=1)
    assert inverted.latents.shape == (1, 4, 16, 16) and bool(inverted.latents.isfinite().all())
    file = save_model(tmp_path / "m.safetensors", components)
    again = LatentDiffusionPipeline.from_pretrained(file)
    assert np.array_equal(again("a cat", latents=latents, progress=False, **options).images, found)


def test_a_resumed_run_is_the_same_run(folder: Path, capsys) -> None:
    from train_latent import main

    assert main(given(folder, "resumed", "loop.max_steps=3")) == 0
    assert main([*given(folder, "resumed"), "--resume"]) == 0
    assert losses(folder / "straight") == losses(folder / "resumed")
    assert sorted(losses(folder / "straight")) == list(range(1, STEPS + 1))
    assert validation(folder / "straight") == validation(folder / "resumed")
    names = [
        p.relative_to(folder / "straight") for p in (folder / "straight").rglob("*.safetensors")
    ]
    weights = [
        name for name in names if name.parts[0] == "model" or f"step-{STEPS:08d}" in name.parts
    ]
    assert len(weights) >= 4
    for name in weights:
        ours, theirs = (load_file(folder / run / name) for run in ("straight", "resumed"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert main([*given(folder, "resumed", "data.inpaint_mask=false"), "--resume"]) == 2
    assert "data.inpaint_mask: True then, False now" in capsys.readouterr().err


METHODS = {
    "inpainting": "model/unet/diffusion_pytorch_model.safetensors",
    "full": "model/unet/diffusion_pytorch_model.safetensors",
    "lora": "lora/pytorch_lora_weights.safetensors",
    "textual_inversion": "learned_embeds.safetensors",
}


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_trains_an_inpainting_model(kind: str, folder: Path) -> None:
    from train_latent import main

    more = ["latents.online=true", "data.crop=random"] if kind == "full" else []
    run = given(
        folder, kind, f"finetune.kind={kind}", "loop.max_steps=2", *more, model="straight/model"
    )
    assert main(run) == 0
    # Such a U-Net is not widened again: the first loss is that of the model given.
    start = validation(folder / kind)[0]
    if kind == "lora":
        assert start == pytest.approx(validation(folder / "straight")[STEPS], rel=1e-5)
        pipeline = LatentDiffusionPipeline.from_pretrained(folder / "straight" / "model")
        latents = torch.randn(1, 4, 16, 16)
        options: dict[str, Any] = {"latents": latents, "progress": False, "output_type": "np"}
        before = pipeline("a cat", num_inference_steps=2, **options).images
        pipeline.load_lora(folder / kind / METHODS[kind], weight=50)
        assert np.abs(pipeline("a cat", num_inference_steps=2, **options).images - before).max() > 0
    trained = load_file(folder / kind / METHODS[kind])
    assert all(bool(t.isfinite().all()) for t in trained.values())
    if "conv_in.weight" in trained:
        assert trained["conv_in.weight"].shape[1] == 9


@pytest.mark.parametrize("buckets", [False, True])
def test_images_are_those_that_were_encoded(buckets: bool, folder: Path, tmp_path: Path) -> None:
    """Unmasked, their latents are the means of the cached moments; masks lie where images do."""
    wide = tmp_path / "images"
    make_images(wide, 4)
    for number, size in enumerate([(48, 32), (32, 32), (48, 32), (32, 32)]):
        image = Image.open(wide / f"{number}.png").resize(size)
        image.save(wide / f"{number}.png")
        Image.fromarray((np.array(image)[..., 0] < 128).astype(np.uint8) * 255).save(
            wide / f"{number}.mask.png"
        )
    shape: dict[str, Any] = {"image_size": 32}
    if buckets:
        shape = {"image_size": 32, "buckets": True, "bucket_step": 8}
    config = DataConfig(path=str(wide), inpaint_mask=True, **shape)
    source, vae = open_source(config), Autoencoder(make_vae())
    cache = build_latent_cache(source, vae, config, tmp_path / "cache", progress=False)
    indices = [i for i in range(4) if cache.buckets[i] == cache.buckets[0]]
    assert len(indices) == (2 if buckets else 4)
    stored, weight = cache.read(indices)
    assert weight is None, "these masks do not weigh the loss"
    seeds = [5 * i for i in indices]
    inputs = cache.pixels(indices, seeds)
    pixels = torch.stack([p.pixels for p in inputs])
    with torch.no_grad():
        torch.testing.assert_close(vae.encode_moments(pixels), stored.float(), rtol=2e-3, atol=2e-3)
    for one in inputs:
        assert one.mask is not None
        dark = one.pixels[0] < 0
        assert float((dark == one.mask).float().mean()) > 0.95
    if not buckets:
        moving = OnlineLatents(source, vae, dataclasses.replace(config, crop="random"))
        cut = torch.stack([p.pixels for p in moving.pixels(indices, seeds)])
        with torch.no_grad():
            torch.testing.assert_close(vae.encode_moments(cut), moving.read(indices, seeds).moments)
        assert not torch.equal(cut, pixels)
        online = OnlineLatents(source, vae, config).pixels(indices, seeds)
        for ours, theirs in zip(online, inputs, strict=True):
            assert torch.equal(ours.pixels, theirs.pixels)
            assert ours.mask is not None and theirs.mask is not None
            assert torch.equal(ours.mask, theirs.mask)
        extra = MaskedImages(vae)
        one, all_ = extra(cache, [2], [10]), extra(cache, indices, seeds)
        torch.testing.assert_close(one[0], all_[2])  # whatever stands beside it
        (wide / "2.png").unlink()
        with pytest.raises(UserError, match=r"2\.png.* is needed with a part of it masked"):
            extra(cache, [2], [10])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["finetune.kind=full"], "data.inpaint_mask=true is for an inpainting model"),
        (["data.loss_mask=file"], "an image has one mask"),
        (["model.pretrained=null"], "finetune.kind=inpainting adds to a model that exists"),
    ],
)
def test_what_cannot_be_is_said_before_training(
    wrong: list[str], message: str, folder: Path, capsys
) -> None:
    from train_latent import main

    assert main(given(folder, "wrong", *wrong)) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "wrong").exists()


@pytest.mark.slow
def test_two_processes_are_one_training(folder: Path) -> None:
    more = ["loop.batch_size=2", "loop.gradient_accumulation=1"]
    script = ROOT / "training" / "train_latent.py"
    run = launch(script, given(folder, "two", *more), "ddp_cpu_2.yaml")
    assert run.returncode == 0, run.stderr[-3000:]
    from train_latent import main

    assert main(given(folder, "one", "loop.batch_size=4", "loop.gradient_accumulation=1")) == 0
    ours, theirs = losses(folder / "two"), losses(folder / "one")
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[k] - theirs[k]) for k in ours) < 1e-5
