"""The frozen text encoder, CLIP's text tower: prompts → a state for every position.

    x = token + position;   x ← x + attention(norm(x));   x ← x + mlp(norm(x)), layer by layer

Attention is causal, so the end token's state has seen the whole text. Names and shapes are those of
transformers' CLIPTextModel, so its weight files load strictly. Written here since importing that
class takes three times as long as importing torch.

As in Stable Diffusion the context for cross-attention is the last state after the final LayerNorm,
at every position, padding included.

Source: Radford et al. 2021, section 2.4, arXiv:2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError, choice_error
from latentdiff.files import read_json
from latentdiff.models.sizes import check_numbers
from latentdiff.models.tokenizer import ClipTokenizer, load_tokenizer
from latentdiff.weights import TEXT_STEM, load_weights, read_weights, stored_dtype


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


#: What transformers takes for a key that config.json does not have.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two matrices around an activation."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each on normalised input with a residual."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Tokens and positions."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        # Always loaded, never drawn: drawing on the meta device imports torch's compiler.
        self.token_embedding, self.position_embedding = (
            nn.Embedding(count, width, _weight=torch.empty(count, width))
            for count in (vocabulary, positions)
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map (B, T) to (B, T, D)."""
        tokens = self.token_embedding(token_ids)
        return tokens + self.position_embedding.weight[: tokens.shape[1]]


class ClipText(nn.Module):
    """The whole tower.

    Args:   config: transformers' config.json; kept as `config`, with its defaults.
    Raises: UserError: an activation that CLIP does not have, or sizes that no tower has.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = c = {**DEFAULTS, **config}
        check_numbers("the text encoder", c)
        if c["hidden_act"] not in ACTIVATIONS:
            raise choice_error("the text encoder's hidden_act", c["hidden_act"], ACTIVATIONS)
        width, hidden, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        if width % heads:
            raise UserError(f"hidden_size must be a multiple of the {heads} heads; got {width}.")
        activation, eps = c["hidden_act"], c["layer_norm_eps"]
        self.embeddings: Any = Embeddings(c["vocab_size"], c["max_position_embeddings"], width)
        layers = [
            Layer(width, heads, hidden, activation, eps) for _ in range(c["num_hidden_layers"])
        ]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, token_ids: Tensor, skip: int = 0) -> Tensor:
        """Map (B, T) to the last states after the final norm, (B, T, width).

        Args: skip: how many of the last layers are left out.
        """
        x = self.embeddings(token_ids)
        layers = list(self.encoder["layers"].children())
        for layer in layers[: len(layers) - skip]:
            x = layer(x)
        return self.final_layer_norm(x)


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
        self.clip_skip = 0
        """How many of the last layers are left out, where a call does not say it."""
        self.before_use: Callable[[], None] | None = None
        """Called before the tower is, to bring it where it computes."""

    @property
    def width(self) -> int:
        """Channels of the context; the U-Net's cross_attention_dim."""
        return int(self.module.config["hidden_size"])

    @property
    def max_length(self) -> int:
        """Tokens per prompt, begin and end token included."""
        return self.tokenizer.max_length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.module.parameters()).dtype

    def encode(self, texts: Sequence[str], clip_skip: int | None = None) -> Tensor:
        """The context of prompts; warns with the words that do not fit.

        Args:    clip_skip: see `checked_skip`.
        Returns: (B, max_length, width), in the weights' dtype.
        """
        return self.encode_tokens(self.tokenizer(texts), clip_skip)

    def encode_tokens(self, token_ids: Tensor, clip_skip: int | None = None) -> Tensor:
        """The context of token ids (B, tokens), as (B, tokens, width)."""
        if self.before_use is not None:
            self.before_use()
        return self.module(token_ids.to(self.device), self.checked_skip(clip_skip))

    def checked_skip(self, clip_skip: int | None) -> int:
        """How many of the last layers are left out; None: as this encoder does.

        The number is diffusers': 1 is the last layer but one, which A1111 calls 2. Stable Diffusion
        2 leaves out a layer of OpenCLIP's that its files do not hold; what is asked comes on top.

        Raises: UserError: not 0 … layers − 1.
        """
        if clip_skip is None:
            return self.clip_skip
        most = int(self.module.config["num_hidden_layers"]) - 1
        if type(clip_skip) is not int or not 0 <= clip_skip <= most:
            raise UserError(
                f"clip_skip must be a whole number from 0 to {most}, the text encoder's layers "
                f"less one (1 is what A1111 calls Clip skip 2); got {clip_skip!r:.40}."
            )
        return clip_skip

    @torch.no_grad()
    def pooled(self, texts: Sequence[str]) -> Tensor:
        """The states at the first end token, which have read the whole text, (B, width).

        What does not fit is left out without a warning.
        """
        rows = [self.tokenizer.padded(self.tokenizer.fit(text)[0]) for text in texts]
        token_ids = torch.tensor(rows, dtype=torch.int64)
        last = (token_ids == self.tokenizer.end_id).int().argmax(1)
        states = self.encode_tokens(token_ids[:, : int(last.max()) + 1])
        return states[torch.arange(len(texts)), last.to(states.device)]

    def count_tokens(self, text: str) -> int:
        """How many tokens a prompt needs, begin and end token included."""
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
    dropped = load_weights(module, state, where, dtype, useless=USELESS)
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
