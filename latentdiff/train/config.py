"""The configuration of training scripts: what all have, and train_latent.py's own.

The defaults of the latter train from scratch on examples/twemoji.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from latentdiff.config import (
    FREE,
    AtLeastOne,
    Decay,
    NotNegative,
    build,
    deciding_values,
    flat,
    given_values,
    removed_options,
    to_dict,
)
from latentdiff.data.source import DataConfig
from latentdiff.diffusion.objective import ObjectiveConfig
from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.errors import UserError
from latentdiff.finetune.full import FullConfig
from latentdiff.finetune.registry import FinetuneConfig
from latentdiff.models.unet_config import UNetConfig
from latentdiff.train.batches import CaptionConfig
from latentdiff.train.ema import PowerEmaConfig
from latentdiff.train.loop import LoopConfig
from latentdiff.train.optimizer import OptimizerConfig


def _small_unet() -> UNetConfig:
    return UNetConfig(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(96, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(3, 4, 4),
        cross_attention_dim=192,
    )


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained, and the frozen parts around it."""

    pretrained: str | None = None
    """Folder, single file or hub id of a model to fine-tune, or `embedded`; null: from scratch."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    vae: str | None = None
    """Model (or its vae folder) of the autoencoder; null takes the pretrained model's, or the
    embedded one."""
    text_encoder: str | None = None
    """Model of the text encoder and its tokenizer; null takes the pretrained model's, or the
    embedded one."""
    clip_skip: NotNegative[int] | None = None
    """How many of the text encoder's last layers are left out; 1 is what A1111 and kohya call 2.
    null: as many as in the pretrained model's training."""
    unet: UNetConfig = field(default_factory=_small_unet)
    """Shape of a U-Net that is trained from scratch. Channels in and out, cross_attention_dim and
    sample_size follow from the frozen parts and the image size when they are not given."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """How attention is computed: torch's own, or xformers."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third slower."""
    channels_last: bool | None = None
    """Memory layout that convolutions in 16 bit like better; in 32 bit it hardly matters. null: in
    16 bit, unless weights are divided among processes."""
    compile: bool = False
    """Compile the U-Net with torch.compile: minutes at the start, then usually faster on a GPU."""


@dataclass(frozen=True)
class LatentsConfig:
    """Where the encoded images are kept."""

    removed: ClassVar = {"pack": None}
    cache_dir: str | None = None
    """Folder of the latent cache; null is ~/.cache/latentdiff."""
    online: bool = False
    """Keep no latents: encode the images of every batch anew. Slower by the encoder's time; for
    sets larger than the disk, and for data.crop=random."""
    batch_size: AtLeastOne[int] = 32
    """Images encoded at a time when the cache is filled."""
    context_megabytes: NotNegative[int] = 1024
    """Memory for the text states of captions."""


@dataclass(frozen=True)
class ValidationConfig:
    """The image grid and the held-out loss, both with the averaged weights."""

    renamed: ClassVar = {"pictures": "images"}
    every: NotNegative[int] = 1000
    """Optimizer steps between validations; 0 validates at the end only."""
    at_start: bool = False
    """Validate before the first step too, to compare a fine-tuned model with its start."""
    raw: bool = True
    """Make a grid with the newest weights too, beside that of the averaged ones."""
    prompts: tuple[str, ...] = ()
    """Prompts of the grid; empty takes captions of the held-out images."""
    images: NotNegative[int] = 16
    """How many captions are taken when no prompts are given; 0 makes no grid."""
    steps: AtLeastOne[int] = 25
    """DDIM steps."""
    guidance: NotNegative[float] = 4.0
    """Guidance scale; up to 1 is off."""
    seed: int = 0
    """Seed of the first image; the next one has the next seed."""
    samples: AtLeastOne[int] = 256
    """Held-out samples (image, timestep, noise) in the loss, the same ones every time."""


@dataclass(frozen=True)
class ExportConfig:
    """The finished model folder, OUTPUT/model."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of the weights in the folder."""


@dataclass(frozen=True)
class LatentLoopConfig(LoopConfig):
    """The loop of train_latent.py, which averages the weights and fits the batch into memory."""

    ema_decay: Decay = 0.999
    """Decay of the weights' moving average, with a warm-up; 0 exports the newest weights."""
    probe_memory: bool = field(default=True, metadata=FREE)
    """On a GPU, try a micro-batch before the first step; if it does not fit, halve it and double
    gradient_accumulation."""


#: Keys of train_autoencoder.py and train_clip.py in their one section `stage`, and those of today.
_LOOP_KEYS = ("max_steps", "mixed_precision", "seed", "checkpoint_every", "log_every")
STAGE_KEYS = {
    "output": "output",
    "learning_rate": "optimizer.lr",
    "batch_size": "loop.batch_size (and counts the images of one process)",
    **{key: f"loop.{key}" for key in _LOOP_KEYS},
    **{key: f"optimizer.{key}" for key in ("warmup_steps", "weight_decay", "clip_norm")},
}


@dataclass(frozen=True)
class RunConfig:
    """What the configuration of every training script has."""

    renamed: ClassVar = {"stage": STAGE_KEYS}
    output: str
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/ and the result."""
    data: DataConfig
    """The captioned images."""
    optimizer: OptimizerConfig
    """AdamW and its learning rate."""
    loop: LoopConfig
    """Length, batches and cadence."""


def small_loop() -> LoopConfig:
    """How train_autoencoder.py and train_clip.py run by default."""
    return LoopConfig(max_steps=1000, batch_size=16, checkpoint_every=250)


def small_optimizer(betas: tuple[float, float]) -> OptimizerConfig:
    """The optimizer of the same two."""
    return OptimizerConfig(lr=1e-3, betas=betas, warmup_steps=100, decay="whole_cosine")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Everything that train_latent.py needs."""

    removed: ClassVar = {"reading": {"weight": 0}, "held": {"attentions": []}}
    output: str = field(default="runs/latent", metadata=FREE)
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, samples/, model/."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network and the frozen parts."""
    finetune: FinetuneConfig = field(default_factory=FullConfig)
    """Which weights are trained, and how."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(zero_terminal_snr=True))
    """The noise levels; a pretrained model's own where a key is not given."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is learnt; `prediction` is a pretrained model's own when it is not given."""
    data: DataConfig = field(default_factory=DataConfig)
    """The captioned images."""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    """How captions vary from one use of an image to the next."""
    latents: LatentsConfig = field(default_factory=LatentsConfig, metadata=FREE)
    """The encoded images."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""
    loop: LatentLoopConfig = field(default_factory=LatentLoopConfig)
    """Length, batches and cadence."""
    power_ema: PowerEmaConfig = field(default_factory=PowerEmaConfig, metadata=FREE)
    """Averages of the weights for choosing their length after the run."""
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=FREE)
    """Validation."""
    export: ExportConfig = field(default_factory=ExportConfig, metadata=FREE)
    """What is written at the end."""


@dataclass(frozen=True)
class Given:
    """A configuration, and which dotted keys a person set (in the file or as overrides)."""

    config: TrainConfig
    """The checked configuration."""
    keys: frozenset[str]
    """Dotted keys that were given, not defaulted."""


def read_config(path: Path | None, overrides: Sequence[str]) -> Given:
    """Load and check a TrainConfig. Raises: UserError: everything that is wrong with it."""
    given = given_values(TrainConfig, path, overrides)
    return Given(build(TrainConfig, given, path), frozenset(flat(given)))


def adopt(given: Given, schedule: ScheduleConfig, prediction: str) -> tuple[TrainConfig, list[str]]:
    """Take schedule and prediction of a pretrained model over, where the user gave nothing.

    Returns: the configuration, and a line for every key that was given and differs.
    """
    config, model_has = given.config, to_dict(schedule)
    asked = {k: getattr(config.schedule, k) for k in model_has if f"schedule.{k}" in given.keys}
    schedule, objective = dataclasses.replace(schedule, **asked), config.objective
    differing = {f"schedule.{k}": (v, model_has[k]) for k, v in asked.items() if v != model_has[k]}
    if "objective.prediction" not in given.keys:
        objective = dataclasses.replace(objective, prediction=prediction)  # type: ignore[arg-type]
    elif objective.prediction != prediction:
        differing["objective.prediction"] = objective.prediction, prediction
    notes = [
        f"note: {key} is {own!r} as given; the pretrained model has {theirs!r}. "
        "The new value is trained and saved; leave the key out to keep the model's own."
        for key, (own, theirs) in differing.items()
    ]
    return dataclasses.replace(config, schedule=schedule, objective=objective), notes


def deciding_facts(config: RunConfig) -> dict[str, Any]:
    """The settings that decide the numbers of a run; a resumed run must have the same ones.

    The batch enters as a whole (see `BatchShape`): how it is cut up changes only rounding.
    """
    facts = deciding_values(config)
    if config.optimizer.decay == "constant":
        del facts["loop.max_steps"]
    if isinstance(config, TrainConfig):
        facts["model.channels_last"] = bool(config.model.channels_last)  # null was false before
    return facts


def default_facts(config: RunConfig) -> dict[str, Any]:
    """What `deciding_facts` says of the defaults; removed options have their value for "off"."""
    return deciding_facts(type(config)()) | removed_options(config)  # type: ignore[call-arg]


def check_given(given: Given) -> None:
    """Refuse keys that cannot have the effect that their writer expects. Raises: UserError."""
    kind = given.config.finetune.kind
    if kind != "full" and given.config.model.pretrained is None:
        raise UserError(
            f"finetune.kind={kind} adds to a model that exists. Name it: model.pretrained=FOLDER, "
            "a hub id, or embedded."
        )
    if kind not in ("full", "inpainting") and given.config.power_ema.every:
        raise UserError(
            f"power_ema.every={given.config.power_ema.every} goes with whole models; the "
            f"averages of finetune.kind={kind} are no whole model. Set power_ema.every=0."
        )
    shape = sorted(key for key in given.keys if key.startswith("model.unet."))
    if given.config.model.pretrained is not None and shape:
        raise UserError(
            f"model.pretrained={given.config.model.pretrained} brings its own U-Net; "
            f"{', '.join(shape)} cannot apply. Remove them, or train from scratch with "
            "model.pretrained=null."
        )
