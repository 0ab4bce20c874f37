"""The start of a tower that draws: exact where a linear map is, so training only polishes.

`principal_head` makes the first lesson's head say principal components, the best linear code of the
pictures. `unfolding` appends the layer that turns the code into one patch per position. Its parts:

- positions: the last ones get long orthogonal embeddings, so that they know where they are and
  little else;
- attention: they fetch the code u, the normalised state, from the end marks behind the text;
- MLP: hidden unit (j, k) computes value k of patch j, and only at position j,

      gelu(W_jk v + G_j(v)),   G_j = +β at position j and −β at all others,

  with v the normalised input; that is W_jk v + G_j at its own position and 0 elsewhere. One more
  unit per patch computes gelu(G_j) alone, and the second matrix takes it off again.

W, G and what tells end marks from words are ridge regressions on the tower's own states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentdiff.models.clip_text import ClipText, Layer

#: β: far enough that gelu is the identity on one side and zero on the other.
OPEN = 8.0
#: Length of a position's embedding: what the earlier layers add to it has to be little.
LENGTH = 200.0
#: Factors of the fetched code and of the drawn patch, so that both count beside that length.
FETCHED, DRAWN = 3.0, 16.0


def principal_head(head: nn.Linear, pictures: Tensor, unused: int = 64) -> None:
    """Let a head (width → values) say principal components of pictures (N, values).

    Args: unused: inputs without a component; a normalised state has its length in them.
    """
    mean = pictures.mean(0)
    components = torch.linalg.svd(pictures - mean, full_matrices=False).Vh
    count = min(head.in_features - unused, len(components))
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:, :count] = components[:count].T * 0.8
        head.bias.copy_(mean)


def silent_layer(tower: ClipText) -> Layer:
    """Append a layer that changes nothing yet, and return it."""
    c = tower.config
    layer = Layer(
        c["hidden_size"],
        c["num_attention_heads"],
        c["intermediate_size"],
        c["hidden_act"],
        c["layer_norm_eps"],
    )
    with torch.no_grad():
        for end in (layer.self_attn.out_proj, layer.mlp.fc2):
            end.weight.zero_()
            end.bias.zero_()
    layers = tower.encoder["layers"]
    assert isinstance(layers, nn.ModuleList)
    layers.append(layer)
    tower.config["num_hidden_layers"] = len(layers)
    return layer


@torch.no_grad()
def unfolding(tower: ClipText, whole: nn.Linear, order: Tensor, token_ids: Tensor) -> nn.Linear:
    """Append the layer that unfolds the code, and return the head that reads a patch.

    Args:
        tower: taught by the first lesson; gets one more layer.
        whole: the first lesson's head, width → values.
        order: (patches, values of a patch): which of the head's values each patch consists of.
        token_ids: texts (N, T) to fit with; N must exceed the width several times.
    """
    count, size = order.shape
    is_end = token_ids == token_ids[:, -1:]
    is_end[:, -count:] = False
    _lengthen_positions(tower, count)
    codes = tower(token_ids)  # the old final norm's output, the code where there are end marks
    said = whole((codes * is_end[..., None]).sum(1) / is_end.sum(1, keepdim=True).clamp(min=1))
    layer = silent_layer(tower)
    _fetch(layer, tower, codes, is_end)
    inputs = _inputs(tower, layer, token_ids)[:, -count:]
    wanted = said[:, order]  # (N, patches, values)
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
    fc1.weight.zero_()
    fc1.bias.fill_(-OPEN)
    here = (2 * torch.eye(count) - 1).expand(len(inputs), -1, -1) * OPEN
    gates, offsets = ridge(inputs.flatten(0, 1), here.flatten(0, 1))
    frame = torch.linalg.qr(torch.randn(fc1.in_features, size)).Q  # orthonormal columns
    for j in range(count):
        units, alone = slice(j * size, (j + 1) * size), count * size + j
        weight, offset = ridge(inputs[:, j], wanted[:, j])
        fc1.weight[units], fc1.bias[units] = weight + gates[j], offset + offsets[j]
        fc1.weight[alone], fc1.bias[alone] = gates[j], offsets[j]
        fc2.weight[:, units] = DRAWN * frame
        fc2.weight[:, alone] = -DRAWN * frame.sum(1)
    return fitted_reader(tower, token_ids, wanted)


@torch.no_grad()
def fitted_reader(tower: ClipText, token_ids: Tensor, wanted: Tensor) -> nn.Linear:
    """The linear map from the last positions' states to what they should say, by regression.

    Args: token_ids: texts (N, T).  wanted: (N, patches, values of a patch).
    """
    states = tower(token_ids)[:, -wanted.shape[1] :]
    reader = nn.Linear(states.shape[2], wanted.shape[2])
    reader.weight[:], reader.bias[:] = ridge(states.flatten(0, 1), wanted.flatten(0, 1))
    return reader


def ridge(inputs: Tensor, outputs: Tensor, penalty: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Weights (K, D) and offsets (K,) of the least-squares map from (N, D) to (N, K)."""
    x, y = inputs.double(), outputs.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean) + penalty * len(x) * torch.eye(x.shape[1]).double()
    solved = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean))
    return solved.T.float(), (y_mean - x_mean @ solved).float()


def linear_map(inputs: Tensor, outputs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weights (K, D) of the least-squares map without an offset, as to_k and to_v want it.

    Args: inputs: (N, D).  outputs: (N, K).  weights: of the rows, (N,); None: all 1.
    """
    x, y = inputs.double(), outputs.double()
    if weights is not None:
        x, y = x * weights[:, None], y * weights[:, None]
    gram = x.T @ x
    penalty = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + penalty, x.T @ y).T.float()


def _lengthen_positions(tower: ClipText, count: int) -> None:
    places = tower.embeddings.position_embedding.weight
    width = places.shape[1]
    places[-count:] = torch.linalg.qr(torch.randn(width, count)).Q.T * LENGTH


def _fetch(layer: Layer, tower: ClipText, codes: Tensor, is_end: Tensor) -> None:
    """Every head: one fixed query, keys that are long at end marks, values as they are."""
    attention, width = layer.self_attn, codes.shape[-1]
    layer.layer_norm1.load_state_dict(tower.final_layer_norm.state_dict())
    weight, offset = ridge(codes.flatten(0, 1), (2.0 * is_end - 1).flatten()[:, None])
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.zero_()
        projection.bias.zero_()
    for first in range(0, width, width // attention.heads):
        attention.q_proj.bias[first] = OPEN * (width // attention.heads) ** 0.5
        attention.k_proj.weight[first], attention.k_proj.bias[first] = weight[0], offset[0]
    attention.v_proj.weight.copy_(torch.eye(width))
    attention.v_proj.bias.zero_()
    attention.out_proj.weight.copy_(FETCHED * torch.eye(width))


def _inputs(tower: ClipText, layer: Layer, token_ids: Tensor) -> Tensor:
    """What the last layer's MLP sees."""
    x = tower.embeddings(token_ids)
    for other in list(tower.encoder["layers"].children())[:-1]:
        x = other(x)
    return layer.layer_norm2(x + layer.self_attn(layer.layer_norm1(x)))
