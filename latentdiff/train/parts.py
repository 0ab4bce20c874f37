"""What a train_latent.py run opens: the U-Net, the frozen parts around it, the encoded images."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.data.folder import repeats
from latentdiff.data.source import Source, open_source, report_skipped, split
from latentdiff.diffusion.objective import check_objective
from latentdiff.diffusion.samplers import timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.files import default_cache
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
    from latentdiff.formats.scheduler import SamplingDefaults

    check_given(given)
    config, notes, model = given.config, list[str](), given.config.model
    base: Components | None = None
    if model.pretrained is not None:
        base = load_model(model.pretrained, revision=model.revision, vae=model.vae)
        config, notes = adopt(given, base.schedule, base.prediction)
        config = resolve_image_size(config, base, "data.image_size" in given.keys)
    # The maths is checked before anything else is opened.
    check_objective(config.objective, config.schedule)
    vae, text = model.vae, model.text_encoder
    autoencoder = (
        base.autoencoder
        if base is not None
        else open_autoencoder(EMBEDDED_MODEL if vae is None else vae)
    )
    text_encoder = (
        base.text_encoder
        if base is not None and text is None
        else open_text_encoder(EMBEDDED_MODEL if text is None else text)
    )
    if base is None:
        config = fit_unet(config, given.keys, autoencoder, text_encoder)
    sampling = SamplingDefaults() if base is None or notes else base.sampling
    skip = (
        model.clip_skip if base is None or model.clip_skip is not None else base.sampling.clip_skip
    )
    components = Components(
        unet=base.unet if base is not None else _new_unet(config),
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        schedule=config.schedule,
        prediction=config.objective.prediction,
        sampling=dataclasses.replace(sampling, clip_skip=skip),
    )
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
        value = getattr(unet, name)
        inpaints = name == "in_channels" and unet.inpaints and config.model.pretrained is not None
        if value != wanted and not inpaints:
            raise UserError(
                f"the U-Net's {name} must equal the {whose.format(wanted)}; got {value}. Set "
                f"model.unet.{name}={wanted}, or choose another model.{key}."
            )
    if config.data.inpaint_mask and not unet.inpaints and config.finetune.kind != "inpainting":
        raise UserError(
            "data.inpaint_mask=true is for an inpainting model, and this one is for text to image. "
            "finetune.kind=inpainting makes it one; data.loss_mask=file weighs the loss instead."
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
    from latentdiff.formats.model import autoencoder_config, latent_size, open_autoencoder

    config, model = given.config, given.config.model
    base = EMBEDDED_MODEL if model.pretrained is None else model.pretrained
    if model.vae is None:
        autoencoder = open_autoencoder(base, model.revision)
    else:
        own = model.pretrained and autoencoder_config(model.pretrained, model.revision)
        autoencoder = open_autoencoder(model.vae, like=own)
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


@dataclass(frozen=True)
class Latents:
    """The encoded images and which of them are held out."""

    data: Any
    """A LatentCache, OnlineLatents or StreamLatents."""
    train: list[int]
    """Indices to train on."""
    held_out: list[int]
    """Indices never trained on; may be empty."""

    def facts(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        digest = hashlib.blake2b(digest_size=12)
        for index in self.train:
            digest.update("\x1f".join((*self.data.captions(index), "\x1e")).encode())
        return {
            "images": self.data.fingerprint(),
            "training images": len(self.train),
            "captions": digest.hexdigest(),
        }


def open_latents(config: TrainConfig, autoencoder: Any, accelerator: Accelerator) -> Latents:
    """Open the data; encode what is not in the cache yet, on one process of each machine.

    Raises: UserError: no data, no captions, no usable image.
    """
    device = accelerator.device
    if config.data.streaming:
        from latentdiff.data.online import StreamLatents

        rank, ranks, seed = accelerator.process_index, accelerator.num_processes, config.loop.seed
        stream = StreamLatents(config.data, autoencoder, device, rank, ranks, seed)
        return Latents(stream, [], [])  # nothing is held out of what is not known beforehand
    source = open_source(config.data)
    if config.latents.online:
        from latentdiff.data.online import OnlineLatents

        data: Any = OnlineLatents(source, autoencoder, config.data, device)
    else:
        data = _cached(source, config, autoencoder, accelerator)
    train, held_out = split(data, config.data.validation_share, config.data.split_seed)
    if config.data.repeat_folders:
        train = [index for index in train for _ in range(repeats(data.name(index))[0])]
    return Latents(data, train, held_out)


def _cached(source: Source, config: TrainConfig, autoencoder: Any, accelerator: Accelerator) -> Any:
    from latentdiff.data.latents import build_latent_cache

    with accelerator.local_main_process_first():
        data = build_latent_cache(
            source,
            autoencoder,
            config.data,
            Path(config.latents.cache_dir or default_cache()),
            batch_size=config.latents.batch_size,
            device=accelerator.device,
            progress=accelerator.is_local_main_process,
        )
    for text in (report_skipped(data.skipped), bucket_table(data)):
        if text and accelerator.is_main_process:
            print(text, flush=True)
    return data


def none_held_out(latents: Latents, config: TrainConfig) -> list[str]:
    """Say that no loss on unseen images will be measured, where that was not asked for."""
    share = config.data.validation_share
    if latents.held_out or not share:  # a share of 0 is a decision, not a surprise
        return []
    if config.data.streaming:
        return [
            "note: no image is held out, so no validation loss is measured: a stream's images "
            "are not known beforehand. Set data.streaming=false to hold some out."
        ]
    more = max(0.2, min(2 * share, 0.5))
    raising = (
        f"Raise it (for example data.validation_share={more:g}), try" if more > share else "Try"
    )
    return [
        f"note: no image is held out, so no validation loss is measured: of "
        f"{len(set(latents.train))} images data.validation_share={share:g} chose none. {raising} "
        "another data.split_seed, or set it to 0 to train on all without this note."
    ]


def bucket_table(data: Any) -> str:
    """Say how many images each aspect-ratio bucket has, or "" where there is one."""
    shapes = getattr(data, "shapes", ())
    if len(shapes) < 2:
        return ""
    numbers = data.buckets.tolist()
    lines = [f"  {h}x{w} latents: {numbers.count(i)}" for i, (_, h, w) in enumerate(shapes)]
    return "\n".join(["images per bucket (height x width):", *lines])


def long_captions(latents: Latents, text_encoder: Any, looked_at: int = 500) -> list[str]:
    """Say how many captions are too long for the text encoder, judged by some of them."""
    # The encoder warns for each such prompt; of a training set once is enough.
    warnings.filterwarnings("ignore", message="the text encoder takes")
    rows = latents.train[:: max(1, len(latents.train) // looked_at)]
    limit = text_encoder.max_length
    long = [row for row in rows if text_encoder.count_tokens(latents.data.captions(row)[0]) > limit]
    if not long:
        return []
    example = latents.data.captions(long[0])[0]
    return [
        f"note: about {len(long) / len(rows):.0%} of the captions are longer than the {limit} "
        f"tokens that the text encoder takes and are cut off there, for example {example[:200]!r}"
    ]
