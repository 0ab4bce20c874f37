"""The model of a train_latent.py run: the U-Net to train, and the frozen parts around it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.diffusion.objective import check_objective
from latentdiff.diffusion.samplers import timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.train.config import Given, TrainConfig, adopt, check_given
from latentdiff.train.distributed import gather_state, is_sharded, process_rank

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentdiff.formats.folder import Components
    from latentdiff.models.unet import UNet


def load_parts(given: Given) -> tuple[Components, TrainConfig, list[str]]:
    """Open or make the U-Net, and open the frozen autoencoder and text encoder.

    Returns: the components, the configuration with what the pretrained model decides, notes.
    Raises: UserError: a part is missing, or two do not fit together.
    """
    from latentdiff.formats.folder import Components
    from latentdiff.formats.model import load_model, open_autoencoder, open_text_encoder

    check_given(given)
    config, notes, model = given.config, list[str](), given.config.model
    base: Components | None = None
    if model.pretrained is not None:
        base = load_model(model.pretrained, revision=model.revision)
        config, notes = adopt(given, base.schedule, base.prediction)
        config = resolve_image_size(config, base, "data.image_size" in given.keys)
    # The maths is checked before anything else is opened.
    check_objective(config.objective, config.schedule)
    vae, text = model.vae, model.text_encoder
    autoencoder = base.autoencoder if base and not vae else open_autoencoder(vae or EMBEDDED_MODEL)
    text_encoder = (
        base.text_encoder if base and not text else open_text_encoder(text or EMBEDDED_MODEL)
    )
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


def resolve_image_size(config: TrainConfig, base: Components, is_given: bool) -> TrainConfig:
    """Train at the pretrained model's image size, or note in the model that it is another now."""
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


def check_fit(components: Components, config: TrainConfig) -> None:
    """Compare the sizes of the parts with each other and the image size. Raises: UserError."""
    unet, autoencoder = components.unet.config, components.autoencoder
    latent = (autoencoder.latent_channels, "autoencoder's {} latent channels", "vae")
    text = (components.text_encoder.width, "text encoder's width {}", "text_encoder")
    for name, (wanted, whose, key) in {
        "in_channels": latent,
        "out_channels": latent,
        "cross_attention_dim": text,
    }.items():
        if (value := getattr(unet, name)) != wanted:
            raise UserError(
                f"the U-Net's {name} must equal the {whose.format(wanted)}; got {value}. Set "
                f"model.unet.{name}={wanted}, or choose another model.{key}."
            )
    if config.validation.prompts or config.validation.images:
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


def frozen_autoencoder(given: Given) -> tuple[Any, TrainConfig]:
    """The autoencoder and image size that train_latent.py takes for the same configuration.

    The U-Net and the text encoder stay closed: of a pretrained model only its image size is read.
    Raises: UserError: no such model.
    """
    from latentdiff.formats.model import latent_size, open_autoencoder

    config, model = given.config, given.config.model
    base = model.pretrained or EMBEDDED_MODEL
    revision = model.revision if model.vae is None else None
    autoencoder = open_autoencoder(model.vae or base, revision)
    if model.pretrained is None or "data.image_size" in given.keys:
        return autoencoder, config
    size = latent_size(base, model.revision)
    if not isinstance(size, int):
        return autoencoder, config
    data = dataclasses.replace(config.data, image_size=size * autoencoder.downscale)
    return autoencoder, dataclasses.replace(config, data=data)


def prefers_channels_last(wanted: bool | None, accelerator: Accelerator) -> bool:
    """The memory layout as configured; without a wish, channels last in 16 bit.

    Sharded weights have to be contiguous.
    """
    if wanted is not None:
        return wanted
    return not accelerator.is_fsdp2 and accelerator.mixed_precision != "no"


def prepare_unet(components: Components, config: TrainConfig, accelerator: Accelerator) -> UNet:
    """Put the U-Net on the device in float32, with the configured kernels and memory layout."""
    unet = components.unet.to(accelerator.device, torch.float32)
    if prefers_channels_last(config.model.channels_last, accelerator):
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unet.set_attention(config.model.attention)
    unet.enable_gradient_checkpointing(config.model.gradient_checkpointing)
    if config.model.compile:
        unet.compile()
    return unet.train()


def gathered(components: Components) -> Components:
    """The parts with a whole U-Net, on the first process at least; all processes call this."""
    if not is_sharded(components.unet):
        return components
    from latentdiff.formats.folder import empty_unet

    state = gather_state(components.unet)
    whole = empty_unet(components.unet.config)
    if process_rank() == 0:
        whole.load_state_dict(state, assign=True)
    return dataclasses.replace(components, unet=whole)
