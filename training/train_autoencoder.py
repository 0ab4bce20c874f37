"""Train the KL autoencoder that turns images into latents.

    accelerate launch training/train_autoencoder.py [--config FILE] [--resume] [a.b=value ...]

With no argument it trains on examples/twemoji. It ends with OUTPUT/vae, a diffusers folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL.Image import Image
from torch import Tensor, nn

from latentdiff.data.images import to_tensor
from latentdiff.data.source import DataConfig, Readable, Source, map_ahead, open_source, split
from latentdiff.errors import command
from latentdiff.formats.folder import save_autoencoder
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.autoencoder_losses import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
)
from latentdiff.models.vae import AutoencoderKL
from latentdiff.train.arguments import command_line
from latentdiff.train.autoencoder import (
    AutoencoderPass,
    AutoencoderTrainConfig,
    build_autoencoder,
    fold_statistics,
    kl_per_dimension,
    latent_statistics,
    posterior,
    psnr,
)
from latentdiff.train.batches import to_device
from latentdiff.train.distributed import on_first
from latentdiff.train.optimizer import make_optimizer
from latentdiff.train.run import Run

CONFIG = Path(__file__).parent / "configs" / "autoencoder.yaml"


def batch_maker(
    source: Source, indices: list[int], run: Run[AutoencoderTrainConfig]
) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Return (step, micro-batch) → (images (B, 3, H, W), ε (B, C, h, w)).

    Both are a pure function of the seed and the numbers of the samples.
    """
    config, shape, device = run.config, run.shape, run.accelerator.device
    network = config.autoencoder
    size = config.crop_size or config.data.image_size
    side = size // network.downscale
    noise = (shape.total, network.latent_channels, side, side)
    order = run.order(indices)
    read = (
        preloaded(source, indices, config.data, device)
        if config.preload
        else on_demand(source, config.data)
    )

    def make(step: int, micro: int) -> tuple[Tensor, Tensor]:
        generator, part = run.generator(step), shape.part(micro)
        flips = torch.rand(shape.total, 1, 1, 1, generator=generator)[part] < 0.5
        eps = torch.randn(noise, generator=generator)[part]
        images = read(order(shape.samples(step, micro)))
        if config.crop_size is not None:
            places = torch.rand(shape.total, 2, generator=generator)[part]
            images = random_squares(images, size, places)
        images = torch.where(flips.to(images.device), images.flip(3), images)
        images = images.to(memory_format=torch.channels_last)
        return to_device(images, device), to_device(eps, device)

    return make


def random_squares(images: Tensor, size: int, places: Tensor) -> Tensor:
    """Cut a square of `size` pixels out of each image.

    Args:
        images: (B, 3, H, W).
        places: (B, 2) in [0, 1): how far down and to the right of all its places each square is.
    Returns: (B, 3, size, size).
    """
    corners = (places * (torch.tensor(images.shape[2:]) - size + 1)).long().tolist()
    squares = zip(images, corners, strict=True)
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in squares])


def on_demand(source: Source, data: DataConfig) -> Callable[[list[int]], Tensor]:
    """Return: indices of images → images (B, 3, H, W), decoded now."""
    readable = Readable(source)
    return lambda chosen: torch.stack([square(readable[i].image, data) for i in chosen])


def preloaded(
    source: Source, indices: list[int], data: DataConfig, device: torch.device
) -> Callable[[list[int]], Tensor]:
    """The same from memory, of the given images: 8 bits a value, as image files have."""
    readable = Readable(source)

    def one(index: int) -> Tensor:
        return ((square(readable[index].image, data) + 1) * 127.5).round().byte()

    threads = os.cpu_count() or 1
    kept = torch.stack(list(map_ahead(one, indices, threads, 4 * threads))).to(device)
    row = {index: number for number, index in enumerate(indices)}

    def read(chosen: list[int]) -> Tensor:
        rows = to_device(torch.tensor([row[i] for i in chosen]), device)
        return kept[rows].float() / 127.5 - 1

    return read


def square(image: Image, data: DataConfig) -> Tensor:
    """An image as the configuration wants it, (3, size, size)."""
    return to_tensor(image, data.image_size, data.crop, background=data.background)


def image_batches(source: Source, indices: list[int], data: DataConfig) -> Iterator[Tensor]:
    """Read the given images in batches of 64."""
    readable = Readable(source)
    for start in range(0, len(indices), 64):
        part = indices[start : start + 64]
        yield torch.stack([square(readable[i].image, data) for i in part])


def train(config: AutoencoderTrainConfig, resume: bool) -> None:
    """Reconstruct, discriminate, step; then standardise the latents and export."""
    loop, weights = config.loop, config.loss
    run = Run(config, resume)
    run.open_output()
    accelerator = run.accelerator
    torch.manual_seed(loop.seed)
    source = open_source(config.data)
    train_set, held_out = split(source, config.data.validation_share, config.data.split_seed)
    vae = build_autoencoder(config.autoencoder, config.data.image_size)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    discriminator = PatchDiscriminator()
    model, critic = accelerator.prepare(AutoencoderPass(vae), discriminator)
    optimizer = make_optimizer(vae, config.optimizer)
    models: dict[str, nn.Module] = {"vae": vae}
    optimizers, others = {"vae": optimizer}, {}
    vae_step = run.optimizer_step(model, accelerator.prepare(optimizer))
    if weights.adversarial:
        optimizer = make_optimizer(discriminator, replace(config.optimizer, betas=(0.5, 0.9)))
        others["discriminator"] = discriminator_step = run.optimizer_step(
            critic, accelerator.prepare(optimizer)
        )
        models["discriminator"], optimizers["discriminator"] = discriminator, optimizer
    distance = None
    if weights.perceptual:
        from latentdiff.models.autoencoder_losses import PerceptualDistance

        distance = PerceptualDistance(stages=weights.perceptual_stages).to(accelerator.device)
    late = round(weights.late_start * loop.max_steps)
    facts = {"images": source.fingerprint(), "training images": len(train_set)}
    if weights.perceptual or weights.adversarial:
        facts["late losses from step"] = late
    run.load_state(models, optimizers, facts | {"models": ", ".join(models)})
    run.open_log()
    make_batch = batch_maker(source, train_set, run)

    for step, (images, eps) in run.loop(vae_step, make_batch, others=others):
        with accelerator.autocast():
            reconstruction, mean, logvar = model(images, eps)
        difference = reconstruction - images
        losses = {
            "l1": difference.abs().mean(),
            "mse": (difference**2).mean(),
            "kl": kl_per_dimension(mean, logvar),
        }
        adversarial = weights.adversarial and step.number >= late
        if distance is not None and step.number >= late:
            with accelerator.autocast():
                losses["perceptual"] = distance(reconstruction, images).float().mean()
        if adversarial:
            discriminator.requires_grad_(False)
            with accelerator.autocast():
                losses["adversarial"] = generator_loss(critic(reconstruction)).float()
            discriminator.requires_grad_(True)
        step.backward(sum(getattr(weights, name) * value for name, value in losses.items()))
        step.update()
        if adversarial:
            with accelerator.autocast():
                real, fake = critic(images), critic(reconstruction.detach())
            discriminator_step.backward(discriminator_loss(real.float(), fake.float()))
            if step.last:
                discriminator_step.update(step.number)
        with torch.no_grad():
            step.log(**losses, psnr=psnr(reconstruction, images).mean())

    run.tracker.close()
    on_first(lambda: export(vae.float().cpu().eval(), source, train_set, held_out, config))
    run.end()


def export(
    vae: AutoencoderKL,
    source: Source,
    train_set: list[int],
    held_out: list[int],
    config: AutoencoderTrainConfig,
) -> None:
    """Fold the latent statistics into the weights, measure held-out PSNR, write OUTPUT/vae."""
    spread = train_set[:: max(1, len(train_set) // 2048)]
    mean, std = latent_statistics(vae, image_batches(source, spread, config.data))
    fold_statistics(vae, mean, std)
    scores: list[float] = []
    with torch.no_grad():
        for images in image_batches(source, held_out[:: max(1, len(held_out) // 512)], config.data):
            rebuilt = vae.decode(posterior(vae, images)[0]).clamp(-1, 1)
            scores += psnr(rebuilt, images).tolist()
    folder = Path(config.output) / "vae"
    save_autoencoder(Autoencoder(vae), folder)
    print(f"latent mean {mean.tolist()} std {std.tolist()} before folding")
    if scores:
        print(f"held-out PSNR {sum(scores) / len(scores):.2f} dB over {len(scores)} images")
    print(f"autoencoder written to {folder}")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    train(*command_line(AutoencoderTrainConfig, CONFIG, __doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
