"""Errors for a part of a model whose output has NaN or infinity, which would be drawn as black."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError


class NotFiniteError(UserError):
    """Numbers that no image can be made of."""


def is_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity; waits for the device.

    Of a sharded tensor all shards are asked, so every process must call this.
    """
    finite: Any = values.isfinite().all()  # of a sharded tensor, bool() would be that of one shard
    return bool(finite.full_tensor() if hasattr(finite, "full_tensor") else finite)


def check_finite(values: Tensor, what: str, part: str, module: nn.Module) -> None:
    """Refuse NaN and infinity; waits for the device. Raises: NotFiniteError: see `not_finite`."""
    if not is_finite(values):
        raise not_finite(what, part, module)


def broken_weight(module: nn.Module) -> str | None:
    """The first parameter or buffer that holds NaN or infinity, by name; None: all are finite."""
    found = (name for name, value in module.state_dict().items() if not is_finite(value))
    return next(found, None)


def not_finite(what: str, part: str, module: nn.Module) -> NotFiniteError:
    """The error, with its cause as far as the part's weights show.

    Args:    what: the numbers.  part: what the module that made them is called.
    """
    weight, dtype = broken_weight(module), next(module.parameters()).dtype
    if weight is not None:
        why = f"so does its weight {weight}: the file is damaged, or the training diverged"
    elif dtype == torch.float16:
        why = "its weights do not: float16 is too narrow for them; use bfloat16 or float32"
    else:
        why = "its weights do not: what it was given is too large (guidance, strength of a LoRA)"
    return NotFiniteError(f"{part} failed: {what} hold NaN or infinity, and {why}.")
