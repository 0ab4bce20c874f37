"""Marks that keep some words legible in a text tower's last states.

A tower that draws is taught to leave out what does not belong to the thing, the ground's colour
above all: from its state at "blue" in "an owl on a blue background" a linear map tells the colour
in 77 % of cases, and finds that token in 63 %. A U-Net has little else to read it from. So each of
the words gets, added to its token's embedding,

    a · u_0 + b · u_j,

u_0 shared, u_j its own, orthonormal and in directions that the tower uses least. No layer writes
along u_0 any more, so it arrives as it was put in; along u_j they do, a little. A head of the U-Net
that always asks for u_0 finds the word, or else the begin mark, whose value is nothing. Words of
one kind, colours or styles, have a head of their own, which does not ask for the other kinds'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.models.attention import Attention
from latentdiff.models.clip_text import ClipText, Layer
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.trainer.unfolding import linear_map

#: Lengths a and b of the two marks; longer ones change more of what is drawn.
SHARED, OWN = 15.0, 20.0
#: Penalty on the squared length of the keys.
RIDGE = 1e-5


@dataclass(frozen=True)
class MarksConfig:
    """Words that stay legible, and who reads them."""

    words: tuple[str, ...] = ()
    """Each entry the words of one kind, with spaces between; each word a single token."""
    attentions: tuple[str, ...] = ()
    """Spatial transformers whose first heads look for them, one head for each kind; not one that
    `reading` names."""

    @property
    def kinds(self) -> list[list[str]]:
        """The words of each kind."""
        return [kind.split() for kind in self.words]

    def validate(self) -> list[str]:
        """List what is out of range."""
        flat = [word for kind in self.kinds for word in kind]
        problems = []
        if not all(self.kinds):
            problems.append("words must have a word in every entry; got an empty one.")
        if len(set(flat)) < len(flat):
            problems.append(f"words must differ; got {', '.join(flat)}.")
        return problems


def token_of(text: TextEncoder, word: str) -> int:
    """The token that a word is. Raises: UserError: a word of several."""
    ids = text.tokenizer([word])[0].tolist()
    found = ids[1 : ids.index(text.tokenizer.end_id, 1)]
    if len(found) != 1:
        raise UserError(f"marks.words: {word!r} must be one token; the vocabulary cuts it into "
                        f"{len(found)}.")  # fmt: skip
    return int(found[0])


@torch.no_grad()
def mark_words(
    text: TextEncoder, kinds: Sequence[Sequence[str]], token_ids: Tensor
) -> list[list[int]]:
    """Mark words in a tower, which is changed in place.

    Args:    kinds: the words, kind by kind.  token_ids: texts (N, T) to see on what the tower uses.
    Returns: the words' tokens, kind by kind.
    """
    tower, tokens = text.module, [[token_of(text, word) for word in kind] for kind in kinds]
    flat = [token for kind in tokens for token in kind]
    directions = least_used(tower, token_ids, 1 + len(flat))
    shared, own = directions[:, :1], directions[:, 1:]
    for layer in _layers(tower):
        for end in (layer.self_attn.out_proj, layer.mlp.fc2):
            end.weight -= shared @ (shared.T @ end.weight)
    embeddings = tower.embeddings
    for table in (embeddings.token_embedding.weight, embeddings.position_embedding.weight):
        table -= ((table - table.mean(0)) @ shared) @ shared.T
    embeddings.token_embedding.weight[flat] += SHARED * shared.T + OWN * own.T
    return tokens


@torch.no_grad()
def least_used(tower: ClipText, token_ids: Tensor, count: int) -> Tensor:
    """Orthonormal directions (width, count) in which states vary, and weights read, least.

    They are orthogonal to (1, …, 1), which layer norms take away.
    """
    seen: list[Tensor] = []
    norms = [n for one in _layers(tower) for n in (one.layer_norm1, one.layer_norm2)]

    def see(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(nn.functional.layer_norm(inputs[0], inputs[0].shape[-1:]).flatten(0, 1))

    handles = [n.register_forward_pre_hook(see) for n in [*norms, tower.final_layer_norm]]
    tower(token_ids)
    for handle in handles:
        handle.remove()
    use = sum((z.T @ z / len(z) for z in seen), torch.zeros(()))
    use = use / use.trace()
    for layer in _layers(tower):
        a = layer.self_attn
        read = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
        for weight, norm in ((read, layer.layer_norm1), (layer.mlp.fc1.weight, layer.layer_norm2)):
            scaled = weight * norm.weight
            use = use + scaled.T @ scaled / scaled.square().sum() / len(norms)
    ones = torch.full((len(use), 1), len(use) ** -0.5)
    return torch.linalg.eigh((use + 1e3 * ones @ ones.T).double())[1][:, :count].float()


@torch.no_grad()
def read_marks(
    unet: UNet,
    names: Sequence[str],
    states: Tensor,
    token_ids: Tensor,
    kinds: Sequence[Sequence[int]],
) -> list[float]:
    """Let the first heads of each named attention fetch which marked words the text has.

    Args:    states: of texts, from the marked tower, (N, T, width).  token_ids: (N, T).
             kinds: the marked tokens, kind by kind; each kind has a head.
    Returns: for each kind the share of texts with such a word in which the head tells which.
    Raises:  UserError: heads too few, or narrower than a kind has words.
    """
    maps = [_maps(states, token_ids, kind) for kind in kinds]
    for name in names:
        transformer: Any = unet.get_submodule(name)
        block = transformer.transformer_blocks[0]
        _ask_always(block.norm2, block.attn2, maps, name)
    shares = []
    for tokens, (keys, values) in zip(kinds, maps, strict=True):
        found = ((states @ keys).softmax(1)[..., None] * (states @ values.T)).sum(1)
        has = torch.stack([(token_ids == token).any(1) for token in tokens], 1)
        some = has.any(1)
        shares.append(float(has[some].gather(1, found[some].argmax(1)[:, None]).float().mean()))
    return shares


def _maps(states: Tensor, token_ids: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys (width,) that find the kind's words, values (words, width) that tell which it is.

    Values are by regression, one-hot at the words and 0 at the begin mark. Keys k are by logistic
    regression: with p = softmax over the text of k·state, the mean of −log p(the words), or of
    −log p(begin mark) where there is none, is least.
    """
    which = torch.stack([token_ids == token for token in tokens], 2)
    marked, begin = which.any(2), torch.zeros(token_ids.shape, dtype=torch.bool)
    begin[:, 0] = True
    chosen = marked | begin
    values = linear_map(states[chosen], which[chosen].float())
    wanted = torch.where(marked.any(1, keepdim=True), marked, begin)
    keys = torch.zeros(states.shape[2], requires_grad=True)
    optimizer = torch.optim.LBFGS([keys], max_iter=80, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = states @ keys
        found = scores.masked_fill(~wanted, -torch.inf).logsumexp(1)
        value = (scores.logsumexp(1) - found).mean() + RIDGE * keys.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return keys.detach(), values


def _ask_always(
    norm: nn.LayerNorm, attention: Attention, maps: Sequence[tuple[Tensor, Tensor]], name: str
) -> None:
    """One channel of the query's input becomes a constant, and the first heads ask by it."""
    width, most = attention.to_q.out_features // attention.heads, max(len(v) for _, v in maps)
    if width < most or attention.heads < len(maps):
        raise UserError(f"{name} must have at least {len(maps)} heads of {most} channels, for as "
                        "many kinds of marked words and words of a kind; it has "
                        f"{attention.heads} of {width}.")  # fmt: skip
    out: Any = attention.to_out[0]
    constant = int(norm.weight.abs().argmin())
    norm.weight[constant], norm.bias[constant] = 0, 1
    attention.to_q.weight[:, constant] = 0
    frame = torch.linalg.qr(torch.randn(len(out.weight), len(maps) * width)).Q
    for head, (keys, values) in enumerate(maps):
        rows = slice(head * width, (head + 1) * width)
        for weight in (attention.to_q.weight, attention.to_k.weight, attention.to_v.weight):
            weight[rows] = 0
        attention.to_q.weight[rows.start, constant] = width**0.5
        attention.to_k.weight[rows.start] = keys
        attention.to_v.weight[rows][: len(values)] = values
    out.weight[:, : len(maps) * width] = 0.7 * attention.heads**0.5 * frame


def _layers(tower: ClipText) -> list[Layer]:
    return [layer for layer in tower.encoder["layers"].children() if isinstance(layer, Layer)]
