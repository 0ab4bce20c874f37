"""The frozen text encoder: prompts → context for cross-attention.

As in Stable Diffusion the context is the last state after the final LayerNorm, at every position,
padding included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.json_text import read_json
from latentdiff.models.clip_text import ClipText
from latentdiff.models.tokenizer import ClipTokenizer, load_tokenizer
from latentdiff.weight_files import TEXT_STEM, place_weights, read_weights, stored_dtype

#: What Stable Diffusion folders, and their readers, put before every weight's name.
PREFIX = "text_model."
#: What files of text towers hold besides it: a constant, and projections next to the image tower.
USELESS = ("embeddings.position_ids", "text_projection.weight")


class TextEncoder(nn.Module):
    """A CLIP text tower with its tokenizer."""

    def __init__(self, module: ClipText, tokenizer: ClipTokenizer) -> None:
        """Put a tower and its tokenizer together."""
        super().__init__()
        self.module = module
        self.tokenizer = tokenizer
        self.dtype_on_disk: torch.dtype | None = None
        """What the weights were stored in; None: they come from no file."""
        self.dropped: list[str] = []
        """Names in the file that the tower has no use for."""

    @property
    def width(self) -> int:
        """Channels of the context; the U-Net's cross_attention_dim."""
        return int(self.module.config["hidden_size"])

    @property
    def max_length(self) -> int:
        """Tokens per prompt, begin and end mark included."""
        return self.tokenizer.max_length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.module.parameters()).dtype

    def encode(self, texts: Sequence[str]) -> Tensor:
        """The context of prompts; warns with the words that do not fit.

        Returns: (B, max_length, width), in the weights' dtype.
        """
        return self.encode_tokens(self.tokenizer(texts))

    def encode_tokens(self, token_ids: Tensor) -> Tensor:
        """The context of token ids (B, tokens), as (B, tokens, width)."""
        return self.module(token_ids.to(self.device))

    def count_tokens(self, text: str) -> int:
        """How many tokens a prompt needs, begin and end mark included."""
        return self.tokenizer.count(text)

    def config_dict(self) -> dict[str, Any]:
        """transformers' config.json of the network."""
        config = {k: v for k, v in self.module.config.items() if k != "_name_or_path"}
        # transformers loads into the type named here, diffusers its parts into float32: a folder of
        # 16-bit weights opens in diffusers without a dtype only when both are the same.
        fixed = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
        return {**config, **fixed, "dtype": "float32"}

    def weights(self) -> dict[str, Tensor]:
        """The state dict under the names that Stable Diffusion folders use."""
        return {PREFIX + name: tensor for name, tensor in self.module.state_dict().items()}


def load_text_encoder(
    text_folder: str | Path,
    tokenizer_folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    variant: str | None = None,
) -> TextEncoder:
    """Read a text encoder and its tokenizer from local folders.

    Args:    text_folder: for example `model/text_encoder`.
             tokenizer_folder: for example `model/tokenizer`.
             dtype: of the weights in memory; None: as they are.  variant: see `read_weights`.
    Returns: frozen, in evaluation mode.
    Raises:  UserError: something missing, another class of model, weights that do not fit.
    """
    folder = Path(text_folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no text encoder at {folder}: config.json does not exist there.")
    module = empty_text_tower(_read_config(folder), folder / "config.json")
    state = {n.removeprefix(PREFIX): t for n, t in read_weights(folder, TEXT_STEM, variant).items()}
    tokenizer = load_tokenizer(tokenizer_folder, module.config["max_position_embeddings"])
    return fill_text_encoder(module, state, tokenizer, folder, dtype)


def empty_text_tower(config: Mapping[str, Any], where: str | Path) -> ClipText:
    """Build a tower whose weights take no memory yet. Raises: UserError: no such tower."""
    try:
        with torch.device("meta"):
            return ClipText(config)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UserError(f"{where} describes no text tower: {error}") from error


def fill_text_encoder(
    module: ClipText,
    state: Mapping[str, Tensor],
    tokenizer: ClipTokenizer,
    where: str | Path,
    dtype: torch.dtype | None,
) -> TextEncoder:
    """Put weights into an empty tower. Raises: UserError: they or the tokenizer do not fit."""
    dropped = place_weights(module, state, where, dtype, useless=USELESS)
    _check_vocabulary(tokenizer, module.config["vocab_size"])
    encoder = TextEncoder(module.eval().requires_grad_(False), tokenizer)
    encoder.dtype_on_disk, encoder.dropped = stored_dtype(state), dropped
    return encoder


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise UserError(
            f"the text encoder must be a CLIPTextModel (model_type clip_text_model); {folder} "
            f"holds model_type {kind!r}."
        )
    return config


def _check_vocabulary(tokenizer: ClipTokenizer, size: int) -> None:
    largest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    if largest >= size:
        raise UserError(
            f"the tokenizer gives ids up to {largest}, but the text encoder has {size} embeddings. "
            "They must come from the same model."
        )
