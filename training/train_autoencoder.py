"""Train the KL autoencoder that turns pictures into latents.

    accelerate launch training/train_autoencoder.py [--config FILE] [--resume] [a.b=value ...]

With no argument it trains the embedded default's. It ends with OUTPUT/vae, a diffusers folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL.Image import Image
from torch import Tensor

from latentdiff.cli.arguments import command_line
from latentdiff.data.images import to_tensor
from latentdiff.data.source import DataConfig, Source, open_source, split
from latentdiff.errors import command
from latentdiff.formats.folder import save_autoencoder
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.autoencoder_losses import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
)
from latentdiff.models.vae import AutoencoderKL
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
from latentdiff.train.distributed import on_first, start_processes
from latentdiff.train.stage import (
    Readable,
    Stage,
    adamw,
    check_stage_output,
    prefetch,
    process_part,
    sample_indices,
)

CONFIG = Path(__file__).parent / "configs" / "autoencoder.yaml"


def batch_maker(
    source: Source,
    indices: list[int],
    config: AutoencoderTrainConfig,
    part: slice,
    device: torch.device,
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return step → (pictures (B, 3, H, W), ε (B, C, h, w)), a pure function of (seed, step)."""
    stage, size, shape = config.stage, config.data.image_size, config.autoencoder
    side = size // 2 ** (len(shape.block_out_channels) - 1)
    read = (
        preloaded(source, indices, config.data, device)
        if config.preload
        else on_demand(source, indices, config.data)
    )

    def make(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
        flips = torch.rand(stage.batch_size, 1, 1, 1, generator=generator)[part] < 0.5
        eps = torch.randn(stage.batch_size, shape.latent_channels, side, side, generator=generator)[
            part
        ]
        chosen = sample_indices(step, len(indices), stage.batch_size, stage.seed)[part]
        images = read(chosen)
        images = torch.where(flips.to(images.device), images.flip(3), images)
        return images.to(memory_format=torch.channels_last), eps

    return make


def on_demand(source: Source, indices: list[int], data: DataConfig) -> Callable[[Tensor], Tensor]:
    """Return: numbers of training pictures → pictures (B, 3, H, W), decoded now."""
    readable = Readable(source)

    def read(chosen: Tensor) -> Tensor:
        return torch.stack([square(readable[indices[i]].image, data) for i in chosen.tolist()])

    return read


def preloaded(
    source: Source, indices: list[int], data: DataConfig, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The same from memory: 8 bits a value, as picture files have."""
    readable = Readable(source)

    def one(index: int) -> Tensor:
        return ((square(readable[index].image, data) + 1) * 127.5).round().byte()

    with ThreadPoolExecutor() as pool:
        kept = torch.stack(list(pool.map(one, indices))).to(device)
    return lambda chosen: kept[chosen.to(device)].float() / 127.5 - 1


def square(image: Image, data: DataConfig) -> Tensor:
    """A picture as the configuration wants it, (3, size, size)."""
    return to_tensor(image, data.image_size, data.crop, background=data.background)


def pictures(source: Source, indices: list[int], data: DataConfig) -> Iterator[Tensor]:
    """Read the given pictures in batches of 64."""
    readable = Readable(source)
    for start in range(0, len(indices), 64):
        part = indices[start : start + 64]
        yield torch.stack([square(readable[i].image, data) for i in part])


def train(config: AutoencoderTrainConfig, resume: bool) -> None:
    """Run the stage: reconstruct, judge, step; then standardise the latents and export."""
    stage_config, weights = config.stage, config.loss
    accelerator = start_processes(stage_config.mixed_precision)
    torch.manual_seed(stage_config.seed)
    check_stage_output(stage_config, resume)
    source = open_source(config.data)
    train_set, held_out = split(source, config.data.validation_share, config.data.split_seed)
    vae = build_autoencoder(config.autoencoder, config.data.image_size)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    judge = PatchDiscriminator()
    model, judge_model = accelerator.prepare(AutoencoderPass(vae), judge)
    modules = {"vae": vae, "judge": judge}
    optimizers = {
        "vae": adamw(vae, stage_config, (0.9, 0.99)),
        "judge": adamw(judge, stage_config, (0.5, 0.9)),
    }
    stage = Stage(modules, optimizers, stage_config, accelerator)
    first = stage.resume(resume)
    late = round(weights.late_start * stage_config.max_steps)
    distance = None
    if weights.perceptual:
        from latentdiff.models.autoencoder_losses import PerceptualDistance

        distance = PerceptualDistance(stages=weights.perceptual_stages).to(accelerator.device)

    part = process_part(stage_config, accelerator)
    make = batch_maker(source, train_set, config, part, accelerator.device)
    for step, (images, eps) in prefetch(make, first, stage_config.max_steps):
        images, eps = images.to(accelerator.device), eps.to(accelerator.device)
        stage.set_rate(step)
        with accelerator.autocast():
            reconstruction, mean, logvar = model(images, eps)
        difference = reconstruction - images
        losses = {
            "l1": difference.abs().mean(),
            "mse": (difference**2).mean(),
            "kl": kl_per_dimension(mean, logvar),
        }
        if step >= late:
            with accelerator.autocast():
                if distance is not None:
                    losses["perceptual"] = distance(reconstruction, images).float().mean()
                if weights.adversarial:
                    judge.requires_grad_(False)
                    losses["adversarial"] = generator_loss(judge_model(reconstruction)).float()
                    judge.requires_grad_(True)
        loss = sum((getattr(weights, n) * v for n, v in losses.items()), torch.zeros(()))
        stage.step(["vae"], loss)
        if step >= late and weights.adversarial:
            with accelerator.autocast():
                real, fake = judge_model(images), judge_model(reconstruction.detach())
            losses["judge"] = discriminator_loss(real.float(), fake.float())
            stage.step(["judge"], losses["judge"])
        with torch.no_grad():
            losses["psnr"] = psnr(reconstruction, images).mean()
        stage.log(step, losses)
        if (step + 1) % stage_config.checkpoint_every == 0 or step + 1 == stage_config.max_steps:
            stage.save(step + 1)
    on_first(lambda: export(vae.float().cpu().eval(), source, train_set, held_out, config))


def export(
    vae: AutoencoderKL,
    source: Source,
    train_set: list[int],
    held_out: list[int],
    config: AutoencoderTrainConfig,
) -> None:
    """Fold the latent statistics into the weights, measure held-out PSNR, write OUTPUT/vae."""
    spread = train_set[:: max(1, len(train_set) // 2048)]
    mean, std = latent_statistics(vae, pictures(source, spread, config.data))
    fold_statistics(vae, mean, std)
    scores: list[float] = []
    with torch.no_grad():
        for images in pictures(source, held_out[:: max(1, len(held_out) // 512)], config.data):
            rebuilt = vae.decode(posterior(vae, images)[0]).clamp(-1, 1)
            scores += psnr(rebuilt, images).tolist()
    folder = Path(config.stage.output) / "vae"
    save_autoencoder(Autoencoder(vae), folder)
    print(f"latent mean {mean.tolist()} std {std.tolist()} before folding")
    if scores:
        print(f"held-out PSNR {sum(scores) / len(scores):.2f} dB over {len(scores)} pictures")
    print(f"autoencoder written to {folder}")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    train(*command_line(AutoencoderTrainConfig, CONFIG, __doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
