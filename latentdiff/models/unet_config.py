"""The U-Net's configuration: the fields of diffusers' UNet2DConditionModel that we support.

Fields that diffusers has and we do not are listed with the one value that leaves them out; any
other value is refused by name, so that no checkpoint is silently read as something it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from latentdiff.errors import UserError, choice_error, did_you_mean
from latentdiff.models.sizes import check_numbers

CLASS_NAME = "UNet2DConditionModel"
#: The diffusers release whose layout is written.
DIFFUSERS_VERSION = "0.42.1"
CHOICES: dict[str, tuple[str | None, ...]] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "time_embedding_type": ("positional", "fourier"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "addition_embed_type": (None, "text"),
}
_PER_LEVEL = (
    *("down_block_types", "up_block_types", "layers_per_block"),
    *("transformer_layers_per_block", "attention_head_dim"),
)

#: Fields of UNet2DConditionModel that are supported at this value only.
FIXED_FIELDS: dict[str, Any] = {
    "act_fn": "silu",
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
}
#: Values that mean the same.
_SYNONYMS = {"act_fn": ("silu", "swish"), "mid_block_only_cross_attention": (None, False)}


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; names and defaults are those of diffusers' UNet2DConditionModel."""

    sample_size: int | tuple[int, int] | None = None
    """Side of the latents that the model was trained on, or (height, width)."""
    in_channels: int = 4
    """Channels of the noisy latents; of an inpainting model with those of `inpaints`."""
    out_channels: int = 4
    """Channels of the prediction."""
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    """One per resolution, finest first: CrossAttnDownBlock2D or DownBlock2D."""
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    """UNetMidBlock2DCrossAttn, UNetMidBlock2D (no attention) or null (no middle block)."""
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    """One per resolution, coarsest first: CrossAttnUpBlock2D or UpBlock2D."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels per resolution, finest first; multiples of norm_num_groups."""
    layers_per_block: int | tuple[int, ...] = 2
    """ResNet blocks per down block; up blocks have one more."""
    transformer_layers_per_block: int | tuple[int, ...] = 1
    """Transformer blocks in each spatial transformer."""
    attention_head_dim: int | tuple[int, ...] = 8
    """NUMBER of attention heads, in all or per resolution (a misnomer kept from diffusers)."""
    cross_attention_dim: int = 1280
    """Channels of the context: the width of the text encoder."""
    use_linear_projection: bool = False
    """Linear layers around the transformers (SD 2.x) instead of 1×1 convolutions (SD 1.x)."""
    upcast_attention: bool = False
    """Compute attention in float32 when the weights are float16 (SD 2.1)."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    norm_eps: float = 1e-5
    """Epsilon of the ResNet blocks' GroupNorms."""
    dropout: float = 0.0
    """Dropout inside the ResNet blocks."""
    time_embedding_type: str = "positional"
    """positional (sinusoidal) or fourier (random frequencies)."""
    time_embedding_dim: int | None = None
    """Width of the time embedding; null for 4 (positional) or 2 (fourier) times the channels."""
    flip_sin_to_cos: bool = True
    """Cosines before sines in the time features."""
    freq_shift: int = 0
    """Shift of the sinusoidal frequencies' exponent."""
    resnet_time_scale_shift: str = "default"
    """What the time embedding does in a ResNet block: default (added between the convolutions) or
    scale_shift (scales and shifts the second norm's output, Dhariwal & Nichol 2021)."""
    addition_embed_type: str | None = None
    """text: add the context, pooled into one vector, to the time embedding (DeepFloyd IF); null:
    the context acts in cross-attention alone."""
    addition_embed_type_num_heads: int = 64
    """Heads of that pooling; cross_attention_dim is a multiple of it."""

    def __post_init__(self) -> None:
        check_numbers("the U-Net", vars(self))
        levels = len(self.block_out_channels)
        for name in _PER_LEVEL:
            value = per_level(getattr(self, name), levels)
            if len(value) != levels:
                raise UserError(
                    f"{name} must have one entry for each of the {levels} block_out_channels; "
                    f"got {len(value)}: {', '.join(map(str, value))}."
                )
        for name, allowed in CHOICES.items():
            given = getattr(self, name)
            for word in given if isinstance(given, tuple) else (given,):
                if word not in allowed:
                    raise choice_error(name, word, map(str, allowed))
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            divisors = {"norm_num_groups": self.norm_num_groups, "attention_head_dim": heads}
            for name, divisor in divisors.items():
                if channels % divisor:
                    raise UserError(
                        f"every one of block_out_channels must be a multiple of {name} "
                        f"({divisor}); got {channels}."
                    )

        if (
            self.addition_embed_type
            and self.cross_attention_dim % self.addition_embed_type_num_heads
        ):
            raise UserError(
                "with addition_embed_type 'text' cross_attention_dim must be a multiple of "
                f"addition_embed_type_num_heads ({self.addition_embed_type_num_heads}); got "
                f"{self.cross_attention_dim}."
            )

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads per resolution, finest first."""
        return per_level(self.attention_head_dim, len(self.block_out_channels))

    @property
    def inpaints(self) -> bool:
        """Whether a mask and the latents of the masked image are given beside the noisy latents."""
        return self.in_channels == 2 * self.out_channels + 1

    @property
    def downscale(self) -> int:
        """By how much the lowest resolution is smaller than the input."""
        return 2 ** (len(self.block_out_channels) - 1)


def per_level(value: Any, levels: int) -> tuple[Any, ...]:
    """Spell out a setting that may be one number for all resolutions."""
    return (value,) * levels if isinstance(value, int) else tuple(value)


def config_from_dict(data: Mapping[str, Any]) -> UNetConfig:
    """Read diffusers' config.json of a UNet2DConditionModel.

    Args:    data: the parsed JSON; fields left out have diffusers' defaults.
    Raises:  UserError: naming every field that is unknown or has an unsupported value.
    """
    given_class = data.get("_class_name", CLASS_NAME)
    if given_class != CLASS_NAME:
        raise UserError(f"the U-Net's class must be {CLASS_NAME}; got {given_class!r}.")
    names = get_type_hints(UNetConfig)
    known: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in data.items():
        if name in names:
            known[name] = tuple(value) if isinstance(value, list) else value
            if not _has_type(known[name], names[name]):
                problems.append(f"{name} must be {_type_words(names[name])}; got {value!r:.80}")
        elif name in FIXED_FIELDS:
            if not _is_neutral(name, value):
                problems.append(f"{name} must be {FIXED_FIELDS[name]!r}; got {value!r:.80}")
        elif not name.startswith("_") and value not in (None, False):
            hint = did_you_mean(name, [*names, *FIXED_FIELDS])
            problems.append(f"{name} is not a known field (given {value!r:.80}).{hint}")
    if problems:
        raise UserError(
            "this U-Net configuration asks for what is not supported: " + "; ".join(problems)
        )
    return UNetConfig(**known)


def config_to_dict(config: UNetConfig) -> dict[str, Any]:
    """Write the configuration as diffusers' config.json, with every field of its class."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    head = {"_class_name": CLASS_NAME, "_diffusers_version": DIFFUSERS_VERSION}
    return head | dict(sorted((fields | FIXED_FIELDS).items()))


#: Types of fields in words, for messages.
_WORDS = {int: "whole number", float: "number", bool: "true|false", str: "text", NoneType: "null"}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is UnionType else (hint,)


def _has_type(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        inner = get_args(option)
        if inner and isinstance(value, tuple):
            fits = inner[-1] is Ellipsis or len(inner) == len(value)
            if fits and all(type(one) is inner[0] for one in value):
                return True
        elif type(value) is option or (option is float and type(value) is int):
            return True
    return False


def _type_words(hint: Any) -> str:
    lists = {option: get_args(option) for option in _options(hint)}
    words = [f"list of {_WORDS[i[0]]}" if i else _WORDS[option] for option, i in lists.items()]
    return " or ".join(words)


def _is_neutral(name: str, value: Any) -> bool:
    if name == "only_cross_attention" and isinstance(value, list):
        return not any(value)
    if name == "addition_time_embed_dim":  # without effect on what we compute
        return True
    return value in _SYNONYMS.get(name, (FIXED_FIELDS[name],))
