"""The parts of a train_latent.py run and how they are put together: networks, pictures, output.

Optional packages are looked for before a run writes anything; every start adds what it ran on to
OUTPUT/environment.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from shlex import quote
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from latentdiff.config import to_dict, to_yaml
from latentdiff.data.source import EXAMPLE, DataConfig, open_source, report_skipped, split
from latentdiff.diffusion.objective import check_objective
from latentdiff.diffusion.samplers import timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.files import write_text
from latentdiff.train.batches import BatchShape, Order, recut
from latentdiff.train.checkpoint import (
    CHECKPOINTS,
    MODEL,
    TrainingState,
    check_output,
    default_cache,
    is_started,
    open_output,
    stored_facts,
)
from latentdiff.train.config import (
    Given,
    RunConfig,
    TrainConfig,
    adopt,
    check_given,
    deciding_facts,
    default_facts,
)
from latentdiff.train.distributed import (
    gather_state,
    is_sharded,
    on_first,
    start_processes,
    was_restarted,
)
from latentdiff.train.ema import Ema
from latentdiff.train.log import Tracker, Writer
from latentdiff.train.loop import OptimizerStep
from latentdiff.train.optimizer import learning_rate, never_at_peak

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentdiff.finetune.trainee import Trainee
    from latentdiff.formats.folder import Components
    from latentdiff.models.unet import UNet


@dataclass(frozen=True)
class SmallRun:
    """A run of train_autoencoder.py or train_clip.py: one copy of a small network per process."""

    config: RunConfig
    """The checked configuration."""
    resume: bool
    """Whether it goes on from a checkpoint."""
    accelerator: Accelerator
    """The processes of the run."""
    shape: BatchShape
    """How the global batch is cut up."""
    notes: list[str]
    """What to say when the log is open."""
    lock: IO[str] | None
    """Keeps other runs out of the output folder while it is open; None but on the first process."""

    @classmethod
    def start(cls, config: RunConfig, resume: bool) -> SmallRun:
        """Start the processes; check and lock the output folder.

        Raises: UserError: the folder holds something else, or nothing to go on from.
        """
        loop, output = config.loop, Path(config.output)
        check_extras(config.optimizer.kind, loop.wandb)
        accelerator = start_processes(loop.mixed_precision)
        resume = resume or (was_restarted() and is_started(output))
        check_output(output, resume)
        before = stored_facts(output / CHECKPOINTS) if resume else None
        notes = check_steps_left(before, loop.max_steps)
        shape, recut = batch_shape(config, accelerator, before)
        notes += recut + never_at_peak(config.optimizer, loop.max_steps)
        notes += on_the_example(config.data)
        accelerator.wait_for_everyone()  # all have looked at the folder before one writes there
        lock = open_output(output) if accelerator.is_main_process else None
        return cls(config, resume, accelerator, shape, notes, lock)

    def order(self, indices: Sequence[int]) -> Order:
        """Which picture comes when."""
        return Order(indices, self.config.loop.seed, lambda seed, epoch: seed * 7919 + epoch)

    def generator(self, step: int) -> torch.Generator:
        """What is random about the pictures of a step, all processes' together."""
        return torch.Generator().manual_seed(self.config.loop.seed * 1_000_003 + step)

    def optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerStep:
        """The optimizer step of a (prepared) model at the configured rate and clipping."""
        config = self.config
        return OptimizerStep(
            self.accelerator,
            model,
            self.accelerator.prepare(optimizer),
            lambda step: learning_rate(step, config.optimizer, config.loop.max_steps),
            config.optimizer.clip_norm,
            self.shape.accumulation,
        )

    def open_log(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        facts: dict[str, Any],
    ) -> tuple[TrainingState, Tracker, int, float]:
        """Load the newest checkpoint if the run goes on; record what runs, and where.

        Args:    facts: what decides the numbers besides the configuration.
        Returns: the state to save, the log, steps made, seconds spent.
        """
        config, accelerator, output = self.config, self.accelerator, Path(self.config.output)
        facts = {**deciding_facts(config), "pictures per step": self.shape.total, **facts}
        facts["models"] = ", ".join(models)
        keep = (config.loop.keep_last, config.loop.keep_every)
        folder = output / CHECKPOINTS
        defaults = default_facts(config)
        state = TrainingState(
            models, optimizers, accelerator, folder, *keep, facts, defaults=defaults
        )
        first_step, seconds = state.resume() if self.resume else (0, 0.0)
        if accelerator.is_main_process:
            save_config(config)
            write_environment(output, environment(accelerator))
        writers = partial(more_writers, config)
        tracker = Tracker(output, first_step, config.loop, accelerator.is_main_process, writers)
        for note in self.notes:
            tracker.say(note)
        return state, tracker, first_step, seconds

    def end(self) -> None:
        """Wait for the other processes and give up the output folder."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.lock is not None:
            self.lock.close()


def load_parts(given: Given) -> tuple[Components, TrainConfig, list[str]]:
    """Open or make the U-Net, and open the frozen autoencoder and text encoder.

    Returns: the components, the configuration with what the pretrained model decides, notes.
    Raises: UserError: a part is missing, or two do not fit together.
    """
    from latentdiff.formats.folder import Components
    from latentdiff.formats.model import load_model

    check_given(given)
    config, notes, model = given.config, list[str](), given.config.model
    base: Components | None = None
    if model.pretrained is not None:
        folder = EMBEDDED_MODEL if model.pretrained == "embedded" else model.pretrained
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


def _autoencoder(name: str | None, base: Components | None) -> Any:
    from latentdiff.formats.model import open_autoencoder

    if name is None and base is not None:
        return base.autoencoder
    return open_autoencoder(name if name is not None else EMBEDDED_MODEL)


def _text_encoder(name: str | None, base: Components | None) -> Any:
    from latentdiff.formats.model import open_text_encoder

    if name is None and base is not None:
        return base.text_encoder
    return open_text_encoder(name if name is not None else EMBEDDED_MODEL)


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
    config: RunConfig, accelerator: Accelerator, before: dict[str, Any] | None
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
    """Count the U-Net's FLOPs and find the machine's, once; see `train.log`.

    Args:    frozen: the U-Net's own weights get no gradient.
    """
    from latentdiff.train.log import Gauges, count_flops, peak_flops

    channels, height, width = latents.data.shape
    tokens = components.text_encoder.max_length
    flops = count_flops(components.unet, (channels // 2, height, width), tokens, frozen)
    peak = peak_flops(accelerator.device, accelerator.mixed_precision)
    return Gauges(accelerator.device, flops, peak * accelerator.num_processes)


def more_writers(config: RunConfig) -> list[Writer]:
    """Where the numbers go besides metrics.jsonl and TensorBoard."""
    if config.loop.wandb is None:
        return []
    from latentdiff.train.log import WandbWriter

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
    from latentdiff.formats.folder import save_components
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


def save_config(config: RunConfig) -> None:
    """Write the resolved configuration to OUTPUT/config.yaml."""
    resolved = to_dict(config)
    if isinstance(config, TrainConfig) and config.model.pretrained is not None:
        # its own configuration says what the U-Net is
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


@dataclass(frozen=True)
class Latents:
    """The encoded pictures and which of them are held out."""

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
            "pictures": self.data.fingerprint(),
            "training pictures": len(self.train),
            "captions": digest.hexdigest(),
        }


def open_latents(config: TrainConfig, autoencoder: Any, accelerator: Accelerator) -> Latents:
    """Open the data; encode what is not in the cache yet, on one process of each machine.

    Raises: UserError: no data, no captions, no usable picture.
    """
    if config.data.streaming:
        from latentdiff.data.online import StreamLatents

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
    from latentdiff.data.latents import build_latent_cache

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
    for text in (report_skipped(data.skipped), bucket_table(data)):
        if text and accelerator.is_main_process:
            print(text, flush=True)
    return Latents(data, *split(data, config.data.validation_share, config.data.split_seed))


def on_the_example(data: DataConfig) -> list[str]:
    """Say that nobody named a data set."""
    return [f"note: data.path is not given; this trains on {EXAMPLE}."] * (data.path is None)


def none_held_out(latents: Latents, config: TrainConfig) -> list[str]:
    """Say that no loss on unseen pictures will be measured, where that was not asked for."""
    share = config.data.validation_share
    if latents.held_out or not share:  # a share of 0 is a decision, not a surprise
        return []
    if config.data.streaming:
        return [
            "note: no picture is held out, so no validation loss is measured: a stream's pictures "
            "are not known beforehand. Set data.streaming=false to hold some out."
        ]
    more = max(0.2, min(2 * share, 0.5))
    raising = (
        f"Raise it (for example data.validation_share={more:g}), try" if more > share else "Try"
    )
    return [
        f"note: no picture is held out, so no validation loss is measured: of {len(latents.train)} "
        f"pictures data.validation_share={share:g} chose none. {raising} another data.split_seed, "
        "or set it to 0 to train on all without this note."
    ]


def bucket_table(data: Any) -> str:
    """Say how many pictures each aspect-ratio bucket has, or "" where there is one."""
    shapes = getattr(data, "shapes", ())
    if len(shapes) < 2:
        return ""
    numbers = data.buckets.tolist()
    lines = [f"  {h}x{w} latents: {numbers.count(i)}" for i, (_, h, w) in enumerate(shapes)]
    return "\n".join(["pictures per bucket (height x width):", *lines])


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


class Worker(NamedTuple):
    """Which process this is; it never speaks to the others."""

    rank: int
    ranks: int
    device: torch.device


def this_worker(rank: int | None = None, ranks: int | None = None) -> Worker:
    """Find out from the launcher's environment, where the caller does not say.

    Args:    rank, ranks: this process's number and how many there are; both or neither.
    Raises:  UserError: one without the other, or rank outside 0 … ranks − 1.
    """
    if (rank is None) != (ranks is None):
        raise UserError("--rank and --ranks belong together: --rank 0 --ranks 4, say.")
    if rank is None or ranks is None:
        rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= rank < ranks:
        raise UserError(f"--rank must lie in 0 … {ranks - 1} for --ranks {ranks}; got {rank}.")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return Worker(rank, ranks, torch.device("cpu"))
    local = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
    return Worker(rank, ranks, torch.device(found.type, local))


def frozen_autoencoder(given: Given) -> tuple[Any, TrainConfig]:
    """The autoencoder and picture size that train_latent.py takes for the same configuration.

    The U-Net and the text encoder stay closed: of a pretrained model only its picture size is read.
    Raises: UserError: no such model.
    """
    from latentdiff.formats.model import latent_size, open_autoencoder

    config, model = given.config, given.config.model
    base: str | Path = EMBEDDED_MODEL
    if model.pretrained is not None and model.pretrained != "embedded":
        base = model.pretrained
    revision = model.revision if model.vae is None else None
    autoencoder = open_autoencoder(base if model.vae is None else model.vae, revision)
    if model.pretrained is None or "data.image_size" in given.keys:
        return autoencoder, config
    size = latent_size(base, model.revision)
    if not isinstance(size, int):
        return autoencoder, config
    data = dataclasses.replace(config.data, image_size=size * autoencoder.downscale)
    return autoencoder, dataclasses.replace(config, data=data)


def check_extras(
    optimizer_kind: str, wandb_project: str | None, finetune_kind: str = "full"
) -> None:
    """Raises: UserError: a setting needs a package that is not installed."""
    needed = []
    if optimizer_kind == "adamw8bit":
        needed.append(("bitsandbytes", "8bit", "optimizer.kind=adamw8bit", "optimizer.kind=adamw"))
    if wandb_project is not None:
        needed.append(("wandb", "wandb", f"loop.wandb={wandb_project}", "loop.wandb=null"))
    if finetune_kind == "lora":
        needed.append(("peft", "lora", "finetune.kind=lora", "finetune.kind=full"))
    for package, extra, given, instead in needed:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{given} needs {package}, which is not installed. Install it with "
                f"`pip install 'latentdiff[{extra}]'`, or set {instead}."
            )


ENVIRONMENT = "environment.json"
_PACKAGES = ("latentdiff", "torch", "diffusers", "transformers", "accelerate", "safetensors")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, machine and processes as JSON values."""
    device = accelerator.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": gpu or str(device),
        "processes": accelerator.num_processes,
        "distribution": str(accelerator.distributed_type).rpartition(".")[2],
        "precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": _commit(),
        **{name: _version(name) for name in _PACKAGES},
    }


def write_environment(folder: Path, facts: dict[str, Any]) -> None:
    """Add this start of the run to OUTPUT/environment.json, a list of all of them."""
    file = folder / ENVIRONMENT
    text = json.dumps([*read_environment(folder), facts], indent=2) + "\n"
    write_text(file, text)


def read_environment(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, the first one first; empty if there is no record."""
    try:
        return json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, marked if it was changed; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
