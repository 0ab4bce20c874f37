"""The kernels that compute softmax(Q Kᵀ/√d) V: PyTorch's own, or xformers when asked for.

Both take and give (B, heads, tokens, head_dim).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from latentdiff.errors import UserError, choice_error

AttentionKind = Literal["sdpa", "xformers"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Pairs of query and key, up to which plain products train faster than the fused kernel on a CPU.
FEW_PAIRS = 64 * 64
#: A CPU's kernel is up to 1.6 times slower for heads whose width is no multiple of this.
EVEN = 8

_INSTEAD = "Use attention 'sdpa', PyTorch's own kernels, which are as fast on current versions."


def attention_backend(kind: str, device: torch.device, dtype: torch.dtype) -> Attend:
    """The function behind a name, after checking that it works on this device.

    Args:    kind: sdpa or xformers.  device, dtype: where the model is now.
    Raises:  UserError: unknown kind, or xformers does not work here, with what is missing.
    """
    if kind not in get_args(AttentionKind):
        raise choice_error("attention", kind, get_args(AttentionKind))
    if kind == "sdpa":
        return sdpa
    operators = _import_xformers()
    if device.type != "cuda":
        raise UserError(
            f"attention 'xformers' was asked for, but the model is on {device.type} and xformers "
            f"has operators for CUDA only. Move the model to a GPU first. {_INSTEAD}"
        )
    trial = torch.zeros(1, 1, 1, 32, device=device, dtype=dtype)
    xformers(trial, trial, trial, operators)
    return lambda query, key, value: xformers(query, key, value, operators)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention, or plain products where its backward pass is slow.

    On CPUs the backward pass of its kernel takes 12 ms and more for 16 tokens, products take 2.
    """
    learns = query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad
    if learns and query.shape[-2] * key.shape[-2] <= FEW_PAIRS:
        return products(query, key, value)
    if query.device.type == "cpu" and query.shape[-1] % EVEN:
        return _widened(query, key, value)
    return scaled_dot_product_attention(query, key, value)


def _widened(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with zeros behind every head's channels; they change nothing but the time."""
    width = query.shape[-1]
    more = (0, -width % (2 * EVEN))
    out = scaled_dot_product_attention(
        pad(query, more), pad(key, more), pad(value, more), scale=width**-0.5
    )
    return out[..., :width]


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q Kᵀ/√d) V as written (Vaswani et al. 2017, eq. 1), with all of Q Kᵀ in memory.

    Scores and softmax have 32 bit at least, as in the fused kernel, whatever autocast says.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(exact) * query.shape[-1] ** -0.5) @ key.to(exact).transpose(-1, -2)
        return scores.softmax(-1).to(value.dtype) @ value


def xformers(query: Tensor, key: Tensor, value: Tensor, operators: Any) -> Tensor:
    """xformers' memory-efficient attention, whose own layout is (B, tokens, heads, head_dim).

    Raises:  UserError: when none of its kernels takes these tensors.
    """
    key, value = key.to(query.dtype), value.to(query.dtype)
    turned = (x.transpose(1, 2) for x in (query, key, value))
    try:
        return operators.memory_efficient_attention(*turned).transpose(1, 2)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"attention 'xformers' was asked for, but no kernel of xformers "
            f"{_version('xformers')} can be loaded or used with PyTorch {torch.__version__} on "
            f"{query.device} in {query.dtype}. Its kernels load only beside the PyTorch and CUDA "
            f"versions that it was built for; `python -m xformers.info` lists them. {_INSTEAD} "
            f"xformers says: {str(error).strip()[:300]}"
        ) from error


def _import_xformers() -> Any:
    try:
        import xformers.ops
    except (ImportError, OSError) as error:
        raise UserError(
            f"attention 'xformers' was asked for, but xformers cannot be imported ({error}). "
            f"Install it with `pip install 'latentdiff[xformers]'`. {_INSTEAD}"
        ) from error
    return xformers.ops


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "(version unknown)"
