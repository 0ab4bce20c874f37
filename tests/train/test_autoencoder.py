"""The autoencoder's training: closed forms, folding, and the script from end to end."""

import gc
import json
import math
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from latentdiff.config import load_config
from latentdiff.data.source import DataConfig, open_source
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.autoencoder_losses import (
    PatchDiscriminator,
    PerceptualDistance,
    discriminator_loss,
    find_weights,
    generator_loss,
)
from latentdiff.train.autoencoder import (
    AutoencoderConfig,
    AutoencoderPass,
    AutoencoderTrainConfig,
    build_autoencoder,
    fold_statistics,
    kl_per_dimension,
    latent_statistics,
    posterior,
    psnr,
)

SCRIPT = Path(__file__).parents[2] / "training" / "train_autoencoder.py"
TINY = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, mid_block_attention=False)


def test_kl_equals_torch_distributions():
    mean, logvar = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(kl_per_dimension(mean, logvar), expected.mean())


def test_psnr_by_hand_and_only_inside_the_mask():
    target = torch.zeros(1, 3, 4, 4)
    image = target.clone()
    image[..., :2] = 0.2  # an error of 0.1 on the scale 0 … 1
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    assert psnr(image, target, mask).item() == pytest.approx(20, abs=1e-4)
    assert psnr(image, target).item() == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def test_an_untrained_network_keeps_the_size_of_images_and_knows_its_noise():
    torch.manual_seed(0)
    config = AutoencoderConfig((16, 32, 48, 96, 160), latent_channels=32, mid_block_attention=False)
    vae = build_autoencoder(config, 64)
    sizes = []
    for level in vae.encoder.down_blocks:
        level.register_forward_hook(lambda module, given, out: sizes.append(out.pow(2).mean()))
    with torch.no_grad():
        mean, logvar = posterior(vae, torch.randn(8, 3, 64, 64))
    # An orthogonal convolution to as many channels keeps the square of the norm, so the mean over
    # four times fewer places is at most four times, and over more channels less.
    assert all(0.05 < size < 4 for size in sizes)
    assert 0.1 < mean.pow(2).mean() < 1
    torch.testing.assert_close(logvar, torch.full_like(logvar, -4.0))


def test_folding_standardises_latents_and_leaves_images_alone():
    torch.manual_seed(0)
    vae = build_autoencoder(TINY, 16).double()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(3).add_(0.1)
        vae.quant_conv.bias.add_(0.7)
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = vae.decode(posterior(vae, images)[0])
        mean, std = latent_statistics(vae, [images[:4], images[4:]])
        fold_statistics(vae, mean.double(), std.double())
        after = vae.decode(posterior(vae, images)[0])
        mean, std = latent_statistics(vae, [images])
    torch.testing.assert_close(after, before, atol=1e-9, rtol=1e-9)
    factor = vae.config["scaling_factor"]
    torch.testing.assert_close(mean * factor, torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(std * factor, torch.ones(4), atol=1e-5, rtol=0)


def test_losses_of_the_discriminator():
    sure = torch.full((2, 1, 3, 3), 2.0)
    assert discriminator_loss(sure, -sure) == 0
    assert discriminator_loss(-sure, sure) == 3
    assert generator_loss(sure) < generator_loss(-sure)
    assert PatchDiscriminator()(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 8, 8)


def test_perceptual_distance_grows_with_the_damage_and_has_a_gradient():
    if find_weights() is None:
        pytest.skip("stlpips-pytorch is not installed")
    distance = PerceptualDistance()
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-3, 3, 64), torch.linspace(-3, 3, 64), indexing="ij")
    smooth = torch.stack([torch.sin(3 * x), torch.cos(2 * y), torch.sin(x * y)])[None]
    noise = torch.randn_like(smooth)
    found = [float(distance(smooth + s * noise, smooth)) for s in (0, 0.1, 0.3, 0.8)]
    assert found[0] == pytest.approx(0, abs=1e-7)
    assert found == sorted(found)
    image = (smooth + 0.3 * noise).requires_grad_()
    distance(image, smooth).sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())


class KilledError(BaseException):
    """What no script catches."""


@pytest.fixture
def command(image_folder, tmp_path):
    """The script on a few images, with every loss term on when the weights are there."""
    perceptual = 0.1 if find_weights() is not None else 0.0

    def run(output: str, *extra: str) -> list[str]:
        return [
            sys.executable, str(SCRIPT), "data.kind=folder", f"data.path={image_folder}",
            "data.image_size=32", "data.validation_share=0.3", "loop.mixed_precision=no",
            "autoencoder.block_out_channels=[8,16]", "autoencoder.norm_num_groups=4",
            f"loss.perceptual={perceptual}", "loss.adversarial=0.05", "loss.late_start=0.5",
            "loop.max_steps=8", "loop.batch_size=4", "loop.log_every=1",
            "loop.checkpoint_every=3", "loop.tensorboard=false",
            f"output={tmp_path / output}", *extra,
        ]  # fmt: skip

    return run


def losses(folder: Path) -> dict[int, float]:
    """Loss by step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [(row["step"], row["l1"]) for row in map(json.loads, lines)]
    assert [step for step, _ in rows] == list(range(1, 9))
    return dict(rows)


def test_script_trains_resumes_exactly_and_writes_a_diffusers_folder(
    command, tmp_path, monkeypatch, capsys
):
    def here(arguments: list[str]) -> int:
        """The script in this process, which has imported torch already."""
        return runpy.run_path(arguments[1])["main"](arguments[2:])

    assert here(command("whole")) == 0
    rename = os.rename

    def rename_and_die(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name == "step-00000006":
            raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(os, "rename", rename_and_die)  # its second checkpoint is whole by then
        here(command("cut"))
    gc.collect()  # a process that is killed has no lock on its folder any more
    assert here([*command("cut"), "--resume"]) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    vae = load_autoencoder(tmp_path / "cut" / "vae", torch.float32)
    images = torch.zeros(1, 3, 32, 32)
    latents = vae.encode(images)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "cut" / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        said = theirs.decode(latents / theirs.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(vae.decode(latents), said, atol=1e-5, rtol=0)
    assert here([*command("kept"), "preload=true"]) == 0
    whole, kept = losses(tmp_path / "whole"), losses(tmp_path / "kept")
    assert kept == pytest.approx(whole, rel=0.02)
    assert here(command("cut")) == 2 and "--resume" in capsys.readouterr().err


def test_preloaded_images_are_the_decoded_ones(image_folder):
    script = runpy.run_path(str(SCRIPT))
    data = DataConfig(kind="folder", path=str(image_folder), image_size=32)
    source = open_source(data)
    indices = list(range(len(source)))[::-1]
    chosen = [1, 0, 1]
    now = script["on_demand"](source, data)(chosen)
    kept = script["preloaded"](source, indices, data, torch.device("cpu"))(chosen)
    assert now.shape == (3, 3, 32, 32)
    torch.testing.assert_close(kept, now, atol=1 / 255 + 1e-6, rtol=0)  # half of an 8-bit step


def test_random_squares_are_where_their_places_say():
    images = torch.arange(3 * 2 * 5 * 7).view(3, 2, 5, 7)
    places = torch.tensor([[0.0, 0.0], [0.999, 0.999], [0.5, 0.5]])
    squares = runpy.run_path(str(SCRIPT))["random_squares"](images, 4, places)
    expected = [images[0, :, :4, :4], images[1, :, 1:, 3:], images[2, :, 1:, 2:6]]
    torch.testing.assert_close(squares, torch.stack(expected))


def test_script_trains_on_crops_of_the_images(command, tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPT))
    seen = []
    forward = AutoencoderPass.forward

    def look(self, images, eps):
        seen.append((images.shape, eps.shape))
        return forward(self, images, eps)

    monkeypatch.setattr(AutoencoderPass, "forward", look)
    assert script["main"](command("crops", "crop_size=16", "loop.max_steps=1")[2:]) == 0
    assert seen == [((4, 3, 16, 16), (4, 8, 8, 8))]
    assert load_autoencoder(tmp_path / "crops" / "vae").module.config["sample_size"] == 32


@pytest.mark.parametrize("size", (33, 15, 0, 48))
def test_crops_fit_into_the_images_and_the_network(size):
    wrong = [f"crop_size={size}", "data.image_size=32", "autoencoder.block_out_channels=[8,16]"]
    with pytest.raises(UserError, match=f"multiple of 2, .* at most data.image_size=32.*{size}"):
        load_config(AutoencoderTrainConfig, None, wrong)


def test_random_crops_are_not_preloaded():
    with pytest.raises(UserError, match="crop=center"):
        load_config(AutoencoderTrainConfig, None, ["preload=true", "data.crop=random"])
