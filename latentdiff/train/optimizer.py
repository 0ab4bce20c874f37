"""The optimizers, and the learning rate as a pure function of the step.

adamw8bit is AdamW with its two moments in 8 bit: a quarter of the optimizer's memory, on GPUs
(Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from latentdiff.config import FREE, Decay, NotNegative, Positive
from latentdiff.train.distributed import local


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become steps, and the learning rate over the run."""

    removed: ClassVar = {"momentum": 0.95}
    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw (Loshchilov & Hutter 2019), or adamw8bit (Dettmers et al. 2022: a quarter of the
    optimizer's memory; needs bitsandbytes and a GPU)."""
    lr: Positive[float] = 3e-4
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of the two moments."""
    eps: Positive[float] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative[float] = 0.01
    """Decoupled weight decay; biases and norms (one-dimensional parameters) have none."""
    warmup_steps: NotNegative[int] = 200
    """Steps of linear warm-up from 0."""
    decay: Literal["constant", "cosine", "whole_cosine"] = "constant"
    """After the warm-up: stay at lr, or fall to 0 along a cosine that ends at loop.max_steps.
    whole_cosine: the cosine starts with the first step, and the warm-up is a factor on it."""
    extend: Literal["restart", "hold", "decay"] | None = field(default=None, metadata=FREE)
    """How a resumed run whose rate fell to 0 at its old loop.max_steps goes on to a larger one.
    restart: warm-up and cosine again over the added steps; hold: lr stays at its peak; decay: at
    once as if the run had been planned so long, so that the rate jumps up to that cosine. Of a run
    that is extended again, all steps after its first end are added ones."""
    clip_norm: NotNegative[float] = 1.0
    """Largest gradient norm; longer gradients are scaled down. 0 turns it off."""


def learning_rate(
    step: int, config: OptimizerConfig, max_steps: int, planned: int | None = None
) -> float:
    """Learning rate of optimizer step `step` (counted from 0).

    Args:    planned: where the run was to end before it was extended to max_steps, if it was; see
             `OptimizerConfig.extend`.
    Source:  cosine and restart: Loshchilov & Hutter 2017, eq. 5, arXiv:1608.03983.
    """
    if planned is not None and config.extend != "decay":
        if step < planned:
            max_steps = planned
        elif config.extend == "hold":
            return config.lr
        else:
            step, max_steps = step - planned, max_steps - planned
    rate = config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay == "constant":
        return rate
    if config.decay == "whole_cosine":
        angle = math.pi * step / max_steps
    else:
        span = max(1, max_steps - config.warmup_steps)
        angle = math.pi * min(1.0, max(0.0, (step - config.warmup_steps) / span))
    return rate * (0.5 * (1 + math.cos(angle)))


def never_at_peak(config: OptimizerConfig, max_steps: int) -> list[str]:
    """Say that a run ends within its warm-up, at another learning rate than the one asked for."""
    if config.warmup_steps <= max_steps:
        return []
    return [
        f"note: the run is shorter (loop.max_steps={max_steps}) than the warm-up "
        f"(optimizer.warmup_steps={config.warmup_steps}): the learning rate rises to "
        f"{learning_rate(max_steps - 1, config, max_steps):.3g} and never reaches optimizer.lr="
        f"{config.lr:g}. Lower optimizer.warmup_steps."
    ]


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the trainable parameters.

    AdamW takes its fused kernel where the device has one.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: Any = AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        optimizer.integer_step = True
        return optimizer
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=trained[0].device.type in ("cpu", "cuda", "mps", "xpu"),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_if_finite(optimizer: torch.optim.Optimizer, gradient_norm: Tensor) -> None:
    """Update the weights unless the gradient holds an infinity or NaN.

    The fused kernel decides this on the device (through the flag that gradient scaling uses), so
    a GPU need not be waited for.
    """
    if optimizer.param_groups[0].get("fused"):
        optimizer.found_inf = (~gradient_norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif bool(gradient_norm.isfinite()):
        optimizer.step()


def named_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors as `<moment>/<parameter name>`."""
    names = {id(p): n for n, p in module.named_parameters()}
    return {
        # The 8-bit optimizer's tables are one tensor for all parameters; files hold each apart.
        f"{key}/{names[id(parameter)]}": (
            value.clone() if key.startswith("qmap") else torch.as_tensor(value)
        )
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_named_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Put back what `named_state` gave (of a sharded parameter the rows that are here).

    Each moment gets its parameter's memory layout.
    """
    parameters = dict(module.named_parameters())
    for full_name, value in tensors.items():
        key, _, name = full_name.partition("/")
        parameter = parameters[name]
        if key == "step" and getattr(optimizer, "integer_step", False):
            optimizer.state[parameter][key] = int(value)
            continue
        if value.shape == local(parameter).shape and key != "step":
            moment = torch.empty_like(parameter, dtype=value.dtype)
            local(moment).copy_(value)
            value = moment.detach()
        elif key == "step" and not optimizer.param_groups[0].get("fused"):
            value = value.clone()  # counted on the CPU; the fused kernel alone wants it there
        else:
            value = value.to(parameter.device).clone()
        optimizer.state[parameter][key] = value
