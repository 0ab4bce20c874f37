"""What numbers a network's configuration may hold, checked before anything is built from them.

Configurations come with strangers' models. Networks are built on the meta device, where a width
takes no memory and is compared with the file's shapes afterwards; but every layer is an object,
and the product of widths must fit into 64 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentdiff.errors import UserError

#: Layers of a network: levels times blocks of a level times transformer layers of a block.
MOST_LAYERS = 1000
MOST_CHANNELS = 2**24
_LAYERS = (
    *("layers_per_block", "transformer_layers_per_block"),
    *("num_hidden_layers", "num_encoder_blocks", "num_decoder_blocks"),
)
_SIZES = (
    *_LAYERS,
    *("in_channels", "out_channels", "latent_channels", "sample_size"),
    *("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels"),
    *("attention_head_dim", "cross_attention_dim", "norm_num_groups", "time_embedding_dim"),
    "addition_embed_type_num_heads",
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    "max_position_embeddings",
)
#: Name → the range.
_REALS = {
    "norm_eps": (0.0, 1.0),
    "layer_norm_eps": (0.0, 1.0),
    "dropout": (0.0, 1.0),
    "scaling_factor": (0.0, 1e6),
    "shift_factor": (-1e6, 1e6),
    "freq_shift": (0.0, 1.0),
    "upsampling_scaling_factor": (1.0, 8.0),
}


def check_numbers(network: str, config: Mapping[str, Any]) -> None:
    """Refuse numbers that no network has.

    Args:    network: how messages call it.
             config: in the names of diffusers and transformers; null and what is not there pass.
    Raises:  UserError: naming the first that is of another type, too large or below 1.
    """
    layers = 1
    for name in _SIZES:
        values = _listed(config.get(name))
        if not all(type(value) is int and 1 <= value <= MOST_CHANNELS for value in values):
            raise UserError(
                f"{network}'s {name} must be whole numbers from 1 to {MOST_CHANNELS:,}; got "
                f"{config[name]!r:.80}."
            )
        layers *= max(values, default=1) if name in _LAYERS else 1
    for name, (least, most) in _REALS.items():
        value = config.get(name)
        if value is not None and not (type(value) in (int, float) and least <= value <= most):
            raise UserError(
                f"{network}'s {name} must be a number from {least} to {most}; got {value!r:.80}."
            )
    levels = max((len(_listed(value)) for value in config.values()), default=1)
    if levels * layers > MOST_LAYERS:
        raise UserError(
            f"{network}'s configuration asks for {levels * layers:,} layers ({levels} levels or "
            f"blocks); at most {MOST_LAYERS:,} are built."
        )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]
