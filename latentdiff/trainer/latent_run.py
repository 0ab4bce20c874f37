"""The parts of a train_latent.py run and how they are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.atomic import write_text
from latentdiff.config import to_dict
from latentdiff.config_yaml import to_yaml
from latentdiff.diffusion.objective import check_objective
from latentdiff.diffusion.samplers import timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError
from latentdiff.trainer.config import Given, TrainConfig, adopt, check_given
from latentdiff.trainer.ema import Ema
from latentdiff.trainer.open_data import Latents
from latentdiff.trainer.order import BatchShape, recut
from latentdiff.trainer.output import MODEL
from latentdiff.trainer.ranks import on_first
from latentdiff.trainer.sharding import gather_state, is_sharded
from latentdiff.trainer.tracking import Writer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentdiff.finetune.trainee import Trainee
    from latentdiff.formats.diffusers_folder import Components
    from latentdiff.models.unet import UNet


def load_parts(given: Given) -> tuple[Components, TrainConfig, list[str]]:
    """Open or make the U-Net, and open the frozen autoencoder and text encoder.

    Returns: the components, the configuration with what the pretrained model decides, notes.
    Raises: UserError: a part is missing, or two do not fit together.
    """
    from latentdiff.formats.components import Components
    from latentdiff.formats.model import load_model

    check_given(given)
    config, notes, model = given.config, list[str](), given.config.model
    base: Components | None = None
    if model.pretrained is not None:
        folder = _embedded() if model.pretrained == "embedded" else model.pretrained
        base = load_model(folder, revision=model.revision)
        config, notes = adopt(given, base.schedule, base.prediction)
        config = settle_size(config, base, "data.image_size" in given.keys)
    # The maths is checked before anything else is opened.
    check_objective(config.objective, config.schedule)
    autoencoder = _autoencoder(model.vae, base)
    text_encoder = _text_encoder(model.text_encoder, base)
    if base is None:
        config = fit_unet(config, given.keys, autoencoder, text_encoder)
    components = Components(
        unet=base.unet if base is not None else _new_unet(config),
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        schedule=config.schedule,
        prediction=config.objective.prediction,
    )
    if base is not None and not notes:
        components.sampling = base.sampling
    check_fit(components, config)
    return components, config, notes


def settle_size(config: TrainConfig, base: Components, is_given: bool) -> TrainConfig:
    """Train at the pretrained model's picture size, or note in the model that it is another now."""
    unet, scale = base.unet, base.autoencoder.downscale
    size = unet.config.sample_size
    if is_given:
        unet.config = dataclasses.replace(unet.config, sample_size=config.data.image_size // scale)
        return config
    if not isinstance(size, int):
        return config
    data = dataclasses.replace(config.data, image_size=size * scale)
    return dataclasses.replace(config, data=data)


def fit_unet(
    config: TrainConfig, given: frozenset[str], autoencoder: Any, text_encoder: Any
) -> TrainConfig:
    """Take from the frozen parts what they decide about a new U-Net, unless it is given."""
    found = {
        "in_channels": autoencoder.latent_channels,
        "out_channels": autoencoder.latent_channels,
        "cross_attention_dim": text_encoder.width,
        # With buckets this is the square one; diffusers then generates that size by default.
        "sample_size": config.data.image_size // autoencoder.downscale,
    }
    changes = {k: v for k, v in found.items() if f"model.unet.{k}" not in given}
    unet = dataclasses.replace(config.model.unet, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, unet=unet))


def _new_unet(config: TrainConfig) -> UNet:
    from latentdiff.models.unet import UNet

    torch.manual_seed(config.loop.seed)
    return UNet(config.model.unet).init_for_training()


def _embedded() -> Path:
    from latentdiff.embedded import EMBEDDED_MODEL

    return Path(EMBEDDED_MODEL)


def _autoencoder(name: str | None, base: Components | None) -> Any:
    from latentdiff.formats.model import open_autoencoder

    if name is None and base is not None:
        return base.autoencoder
    return open_autoencoder(name if name is not None else _embedded())


def _text_encoder(name: str | None, base: Components | None) -> Any:
    from latentdiff.formats.model import open_text_encoder

    if name is None and base is not None:
        return base.text_encoder
    return open_text_encoder(name if name is not None else _embedded())


def check_fit(components: Components, config: TrainConfig) -> None:
    """Compare the sizes of the parts with each other and the picture size. Raises: UserError."""
    unet, autoencoder = components.unet.config, components.autoencoder
    channels = autoencoder.latent_channels
    for name, value in (("in_channels", unet.in_channels), ("out_channels", unet.out_channels)):
        if value != channels:
            raise UserError(
                f"the U-Net's {name} must equal the autoencoder's {channels} latent channels; got "
                f"{value}. Set model.unet.{name}={channels}, or choose another model.vae."
            )
    width = components.text_encoder.width
    if unet.cross_attention_dim != width:
        raise UserError(
            f"the U-Net's cross_attention_dim must equal the text encoder's width {width}; got "
            f"{unet.cross_attention_dim}. Set model.unet.cross_attention_dim={width}, or choose "
            "another model.text_encoder."
        )
    if config.validation.prompts or config.validation.pictures:
        try:
            timestep_grid(NoiseSchedule(config.schedule), config.validation.steps)
        except UserError as error:
            raise UserError(f"validation.steps: {error}") from error
    size, key = config.data.image_size, "image_size"
    if config.data.buckets:
        size, key = config.data.bucket_step, "bucket_step"
    try:
        autoencoder.check_image_size(size)
    except UserError as error:
        raise UserError(f"data.{key}: {error}") from error
    step = autoencoder.downscale * unet.downscale
    if size % step:
        below = max(step, size // step * step)
        raise UserError(
            f"data.{key} must be a multiple of {step} (the autoencoder divides it by "
            f"{autoencoder.downscale}, the U-Net's levels by {step // autoencoder.downscale}); got "
            f"{size}. Try {below} or {below + step}."
        )


def likes_channels_last(wanted: bool | None, accelerator: Accelerator) -> bool:
    """The memory layout as configured; without a wish, channels last in 16 bit.

    Sharded weights have to be contiguous.
    """
    if wanted is not None:
        return wanted
    return not accelerator.is_fsdp2 and accelerator.mixed_precision != "no"


def prepare_unet(components: Components, config: TrainConfig, accelerator: Accelerator) -> UNet:
    """Put the U-Net on the device in float32, with the configured kernels and memory layout."""
    unet = components.unet.to(accelerator.device, torch.float32)
    if likes_channels_last(config.model.channels_last, accelerator):
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unet.set_attention(config.model.attention)
    unet.enable_gradient_checkpointing(config.model.gradient_checkpointing)
    if config.model.compile:
        unet.compile()
    return unet.train()


def check_steps_left(before: dict[str, Any] | None, max_steps: int) -> list[str]:
    """Say that a run to go on with has no steps left, where that is so.

    Args:    before: manifest of the checkpoint to go on from.
    Raises:  UserError: it has more steps than the run should have.
    """
    done = 0 if before is None else int(before["step"])
    if done > max_steps:
        raise UserError(
            f"--resume: the run has made {done} steps, and loop.max_steps={max_steps} is less. Set "
            f"loop.max_steps to {done} or more, or train {max_steps} steps in another output "
            "folder."
        )
    return [
        f"note: all loop.max_steps={max_steps} steps have been made before; nothing is trained, "
        "and the result is written again."
    ] * (done == max_steps)


def batch_shape(
    config: TrainConfig, accelerator: Accelerator, before: dict[str, Any] | None
) -> tuple[BatchShape, list[str]]:
    """How the global batch is cut up in this launch, and a note if that is not as configured.

    Args:    before: manifest of the checkpoint to go on from. When another number of processes
             wrote it, the pictures per step stay as many as they were.
    """
    loop, count = config.loop, accelerator.num_processes
    shape = BatchShape(
        loop.batch_size, loop.gradient_accumulation, count, accelerator.process_index
    )
    if before is None or before["processes"] == count:
        return shape, []
    kept = recut(shape, before["facts"]["pictures per step"])
    if kept == shape:
        return shape, []
    return kept, [
        f"note: {count} processes go on where {before['processes']} were; a step stays "
        f"{kept.total} pictures with loop.batch_size={kept.per_process} and "
        f"loop.gradient_accumulation={kept.accumulation}."
    ]


def make_gauges(
    components: Components, latents: Latents, accelerator: Accelerator, frozen: bool = False
) -> Callable[[float], dict[str, float]]:
    """Count the U-Net's FLOPs and find the machine's, once; see `flops`.

    Args:    frozen: the U-Net's own weights get no gradient.
    """
    from latentdiff.trainer.flops import count_flops, peak_flops
    from latentdiff.trainer.gauges import Gauges

    channels, height, width = latents.data.shape
    tokens = components.text_encoder.max_length
    flops = count_flops(components.unet, (channels // 2, height, width), tokens, frozen)
    peak = peak_flops(accelerator.device, accelerator.mixed_precision)
    return Gauges(accelerator.device, flops, peak * accelerator.num_processes)


def more_writers(config: TrainConfig) -> list[Writer]:
    """Where the numbers go besides metrics.jsonl and TensorBoard."""
    if config.loop.wandb is None:
        return []
    from latentdiff.trainer.wandb_log import WandbWriter

    return [WandbWriter(config.loop.wandb, Path(config.output), to_dict(config))]


def export_trained(
    config: TrainConfig, components: Components, trainee: Trainee, ema: Ema, writes: bool
) -> list[Path]:
    """Write what the run has made, with the averaged weights; return files and folders.

    All processes must call this; see `export`.
    """
    if (write := trainee.export) is None:
        return [export(config, components, ema, writes)]
    with ema.applied():
        return on_first(lambda: write(Path(config.output), _dtype(config))) or []


def _dtype(config: TrainConfig) -> torch.dtype:
    return getattr(torch, config.export.dtype)


def export(config: TrainConfig, components: Components, ema: Ema, writes: bool) -> Path:
    """Write OUTPUT/model with the averaged weights; return the folder.

    All processes must call this: those that do not write hand over their shards.
    Raises: UserError: on all of them; a model that was there before is as it was.
    """
    from latentdiff.formats.diffusers_folder import save_components
    from latentdiff.models.unet import UNet

    folder = Path(config.output) / MODEL
    with ema.applied():
        if is_sharded(components.unet):
            state = gather_state(components.unet, writes)
            with torch.device("meta"):
                whole = UNet(components.unet.config)
            if writes:
                whole.load_state_dict(state, assign=True)
            components = dataclasses.replace(components, unet=whole)
        on_first(lambda: save_components(folder, components, _dtype(config)))
    return folder


def save_config(config: TrainConfig) -> None:
    """Write the resolved configuration to OUTPUT/config.yaml."""
    resolved = to_dict(config)
    if config.model.pretrained is not None:  # its own configuration says what the U-Net is
        del resolved["model"]["unet"]
    write_text(Path(config.output) / "config.yaml", to_yaml(resolved))


def ending(config: TrainConfig, written: list[Path], trainee: Trainee) -> str:
    """Say what a run has written and how to use it, as a shell takes it."""
    base = config.model.pretrained
    model = "" if base in (None, "embedded") else f"--model {quote(base)} "
    adds = model + trainee.usage.replace("{output}", quote(config.output))
    usage = adds if trainee.usage else f"--model {quote(''.join(map(str, written)))}"
    files = "".join(f"\nmodel: {path}" for path in written)
    return f'{files}\nuse it: python inference/generate.py "{trainee.example}" {usage}'
