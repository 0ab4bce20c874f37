"""AdamW with its two moments in 8 bit: a quarter of the optimizer's memory, on GPUs.

Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
"""

from __future__ import annotations

from typing import Any

import torch

from latentdiff.errors import UserError


def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit over parameter groups.

    Args:   settings: lr, betas, eps, weight_decay.
    Raises: UserError: bitsandbytes is not installed or does not work here.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"optimizer.kind=adamw8bit needs bitsandbytes, which cannot be imported ({error}). "
            "Install it with `pip install 'latentdiff[8bit]'` on a machine with a GPU, or use "
            "optimizer.kind=adamw."
        ) from error
    optimizer: Any = AdamW8bit(groups, **settings)
    optimizer.integer_step = True
    return optimizer
