"""The parts of a train_latent.py run and how they are put together."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.config import to_dict
from latentdiff.config_yaml import to_yaml
from latentdiff.data.source import open_source, report_skipped, split
from latentdiff.diffusion.objective import check_objective
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError
from latentdiff.trainer.config import Given, TrainConfig, adopt, check_given
from latentdiff.trainer.context import ContextCache
from latentdiff.trainer.ema import Ema
from latentdiff.trainer.order import BatchShape, recut
from latentdiff.trainer.output import MODEL, SAMPLES, default_cache
from latentdiff.trainer.sharding import gather_state, is_sharded
from latentdiff.trainer.tracking import Tracker, Writer
from latentdiff.trainer.validation import held_out_loss, picture_grid, pictures, write_png

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentdiff.finetune.trainee import Trainee
    from latentdiff.formats.diffusers_folder import Components
    from latentdiff.models.unet import UNet


@dataclass(frozen=True)
class Latents:
    """The encoded pictures and which of them are held out."""

    data: Any
    """A LatentCache, LatentPack, OnlineLatents or StreamLatents."""
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
            "pictures": self.data.fingerprint(),
            "training pictures": len(self.train),
            "captions": digest.hexdigest(),
        }


def load_parts(given: Given) -> tuple[Components, TrainConfig, list[str]]:
    """Open or make the U-Net, and open the frozen autoencoder and text encoder.

    Returns: the components, the configuration with what the pretrained model decides, notes.
    Raises: UserError: a part is missing, or two do not fit together.
    """
    from latentdiff.formats.diffusers_folder import Components, load_components

    check_given(given)
    config, notes, model = given.config, list[str](), given.config.model
    base: Components | None = None
    if model.pretrained is not None:
        folder = _embedded() if model.pretrained == "embedded" else model.pretrained
        base = load_components(folder, revision=model.revision)
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
    }
    if config.latents.pack is None:
        # With buckets this is the square one; diffusers then generates that size by default.
        found["sample_size"] = config.data.image_size // autoencoder.downscale
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


def _autoencoder(folder: str | None, base: Components | None) -> Any:
    from latentdiff.formats.diffusers_folder import resolve_folder
    from latentdiff.models.autoencoder import load_autoencoder

    if folder is None and base is not None:
        return base.autoencoder
    found = resolve_folder(folder) if folder is not None else _embedded()
    inner = found / "vae"
    return load_autoencoder(inner if inner.is_dir() else found, torch.float32)


def _text_encoder(folder: str | None, base: Components | None) -> Any:
    from latentdiff.formats.diffusers_folder import resolve_folder
    from latentdiff.models.text_encoder import load_text_encoder

    if folder is None and base is not None:
        return base.text_encoder
    found = resolve_folder(folder) if folder is not None else _embedded()
    return load_text_encoder(found / "text_encoder", found / "tokenizer")


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
    if config.latents.pack is not None:
        return
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


def open_latents(config: TrainConfig, autoencoder: Any, accelerator: Accelerator) -> Latents:
    """Open the data without what data.quarantine lists. Raises: UserError: see open_all."""
    found = open_all(config, autoencoder, accelerator)
    if config.latents.pack is None or config.data.quarantine is None:
        return found  # where pictures are opened, open_source leaves them out
    train, held_out = (unlisted(found.data, part, config) for part in (found.train, found.held_out))
    return Latents(found.data, train, held_out)


def open_all(config: TrainConfig, autoencoder: Any, accelerator: Accelerator) -> Latents:
    """Open the data; encode what is not in the cache yet, on one process of each machine.

    Raises: UserError: no data, no captions, no usable picture.
    """
    if config.data.streaming:
        from latentdiff.data.stream import StreamLatents

        rank, ranks = accelerator.process_index, accelerator.num_processes
        stream = StreamLatents(
            config.data, autoencoder, accelerator.device, rank, ranks, config.loop.seed
        )
        return Latents(stream, [], [])  # nothing is held out of what is not known beforehand
    if config.latents.online:
        from latentdiff.data.online import OnlineLatents

        data: Any = OnlineLatents(
            open_source(config.data), autoencoder, config.data, accelerator.device
        )
        return Latents(data, *split(data, config.data.validation_share, config.data.split_seed))
    if config.latents.pack is not None:
        from latentdiff.data.latent_pack import LatentPack

        data = LatentPack(config.latents.pack)
    else:
        from latentdiff.data.latent_cache import build_latent_cache

        source = open_source(config.data)
        folder = Path(config.latents.cache_dir or default_cache())
        with accelerator.local_main_process_first():
            data = build_latent_cache(
                source,
                autoencoder,
                config.data,
                folder,
                batch_size=config.latents.batch_size,
                device=accelerator.device,
                progress=accelerator.is_local_main_process,
            )
        if accelerator.is_main_process and (text := report_skipped(data.skipped)):
            print(text, flush=True)
        if accelerator.is_main_process and (text := bucket_table(data)):
            print(text, flush=True)
    return Latents(data, *split(data, config.data.validation_share, config.data.split_seed))


def unlisted(data: Any, indices: list[int], config: TrainConfig) -> list[int]:
    """Leave out of a latent pack what data.quarantine lists, as opening pictures does."""
    from latentdiff.data.quarantine import read_quarantine

    listed = read_quarantine(config.data.quarantine or "")
    kept = [index for index in indices if data.name(index) not in listed]
    if indices and not kept:
        raise UserError(f"data.quarantine: {config.data.quarantine} lists all of the pictures.")
    return kept


def bucket_table(data: Any) -> str:
    """Say how many pictures each aspect-ratio bucket has, or "" where there is one."""
    shapes = getattr(data, "shapes", ())
    if len(shapes) < 2:
        return ""
    numbers = data.buckets.tolist()
    lines = [f"  {h}x{w} latents: {numbers.count(i)}" for i, (_, h, w) in enumerate(shapes)]
    return "\n".join(["pictures per bucket (height x width):", *lines])


def prepare_unet(components: Components, config: TrainConfig, device: torch.device) -> UNet:
    """Put the U-Net on the device in float32, with the configured kernels and memory layout."""
    unet = components.unet.to(device, torch.float32)
    if config.model.channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unet.set_attention(config.model.attention)
    unet.enable_gradient_checkpointing(config.model.gradient_checkpointing)
    if config.model.compile:
        unet.compile()
    return unet.train()


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


class Validator:
    """Writes OUTPUT/samples/step-N.png (averaged weights), step-N-raw.png (the newest) and the
    held-out loss on the main process.

    The others wait, or compute along where the U-Net is sharded: a pass needs all shards.
    """

    def __init__(
        self,
        config: TrainConfig,
        components: Components,
        latents: Latents,
        context: ContextCache,
        ema: Ema,
        tracker: Tracker,
        accelerator: Accelerator,
        model: Any = None,
    ) -> None:
        self._config, self._parts, self._latents = config, components, latents
        self._model = components.unet if model is None else model
        self._context, self._ema, self._tracker = context, ema, tracker
        self._accelerator = accelerator
        self._schedule = NoiseSchedule(config.schedule)
        self._prompts = config.validation.prompts or self._captions(config.validation.pictures)

    def due(self, step: int) -> bool:
        """Whether to validate after so many steps (the end comes by itself)."""
        every = self._config.validation.every
        return bool(every) and step % every == 0

    def __call__(self, step: int) -> None:
        """Validate the averaged weights; the other processes wait."""
        unet = self._model
        if self._accelerator.is_main_process or is_sharded(unet):
            was_training = unet.training
            with self._ema.applied(), self._accelerator.autocast():
                unet.eval()
                self._loss(step)
                self._grid(step, "")
            if self._config.validation.raw:
                with self._accelerator.autocast():
                    self._grid(step, "-raw")
            unet.train(was_training)
        self._accelerator.wait_for_everyone()

    def _loss(self, step: int) -> None:
        if not self._latents.held_out:
            return
        loss = held_out_loss(
            self._model,
            self._parts.autoencoder,
            self._latents.data,
            self._latents.held_out,
            self._context,
            self._schedule,
            self._config.objective,
            self._config.validation.samples,
            self._config.loop.seed,
        )
        self._tracker.write([{"step": step, **loss.row()}])
        self._tracker.say(f"step {step}: validation loss {loss.mean:.4f}")

    def _grid(self, step: int, kind: str) -> None:
        if not self._prompts:
            return
        validation, (channels, height, width) = self._config.validation, self._latents.data.shape
        images = pictures(
            self._model,
            self._parts.autoencoder,
            self._context,
            self._schedule,
            self._config.objective.prediction,
            self._prompts,
            (channels // 2, height, width),
            steps=validation.steps,
            guidance=validation.guidance,
            seed=validation.seed,
        )
        grid = picture_grid(images)
        if self._accelerator.is_main_process:
            write_png(grid, Path(self._config.output) / SAMPLES / f"step-{step:08d}{kind}.png")
        self._tracker.image(f"samples{kind}", step, grid)

    def _captions(self, count: int) -> Sequence[str]:
        rows = self._latents.held_out or self._latents.train
        chosen = rows[:: max(1, len(rows) // max(1, count))][:count]
        return [self._latents.data.captions(row)[0] for row in chosen]


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
    if trainee.export is None:
        return [export(config, components, ema, writes)]
    with ema.applied():
        return trainee.export(Path(config.output), _dtype(config)) if writes else []


def _dtype(config: TrainConfig) -> torch.dtype:
    return getattr(torch, config.export.dtype)


def export(config: TrainConfig, components: Components, ema: Ema, writes: bool) -> Path:
    """Write OUTPUT/model with the averaged weights; return the folder.

    All processes must call this: those that do not write hand over their shards.
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
        if writes:
            save_components(folder, components, _dtype(config))
    return folder


def save_config(config: TrainConfig) -> None:
    """Write the resolved configuration to OUTPUT/config.yaml."""
    resolved = to_dict(config)
    if config.model.pretrained is not None:  # its own configuration says what the U-Net is
        del resolved["model"]["unet"]
    file = Path(config.output) / "config.yaml"
    file.write_text(to_yaml(resolved), encoding="utf-8")


def ending(config: TrainConfig, written: list[Path], usage: str) -> str:
    """Say what a run has written and how to use it; usage: see `Trainee`."""
    base = config.model.pretrained
    model = "" if base in (None, "embedded") else f"--model {base} "
    adds = model + usage.replace("{output}", config.output)
    usage = adds if usage else f"--model {''.join(map(str, written))}"
    files = "".join(f"\nmodel: {path}" for path in written)
    return f'{files}\nuse it: python inference/generate.py "a cat" {usage}'
