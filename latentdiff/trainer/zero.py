"""DeepSpeed's ZeRO-2: every process has the whole weights and its piece of moments and gradients.

The optimizer steps flat float32 pieces, and the engine puts the new weights together on all
processes. So the average needs no exchange: it is of whole weights, whole on each process. In a
checkpoint the moments stand by name and whole, as one process writes them; any launch reads them.

Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.trainer.descent import Descent
from latentdiff.trainer.optimizer import set_learning_rate
from latentdiff.trainer.ranks import process_rank

if TYPE_CHECKING:
    from accelerate import Accelerator

_INSTEAD = "launch with training/accelerate/fsdp2_shard_grad_op.yaml, which divides the same"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def wants_zero() -> bool:
    """Whether the launch configuration asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def zero_plugin(precision: str) -> Any:
    """Accelerate's plugin for ZeRO-2 in 32 bit; `prepare_engine` adds the arithmetic of a pass.

    Weights, moments and sums of gradients stay in 32 bit, as in every other launch; DeepSpeed's own
    bf16 mode would round the weights that the average is taken of.
    Raises: UserError: another stage, offloading, a DeepSpeed file, fp16, or not installed.
    """
    _check_launch(precision)
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports with it
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    plugin.arithmetic = precision
    return plugin


def _check_launch(precision: str) -> None:
    def said(name: str, default: str) -> str:
        return os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", default)

    if (stage := said("ZERO_STAGE", "2")) != "2":
        raise UserError(
            f"DeepSpeed works with zero_stage=2; the launch configuration says {stage}. Stage 3 "
            "keeps weights in a form that averages and exact resume cannot be computed from: "
            "launch with training/accelerate/fsdp2_full_shard.yaml, which divides the same."
        )
    for name in ("CONFIG_FILE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE"):
        if (value := said(name, "none")) != "none":
            raise UserError(
                f"DeepSpeed's {name.lower()}={value} is not supported: precision, clipping and the "
                "optimizer are the run's own. Remove it from the launch configuration, or "
                f"{_INSTEAD}."
            )
    if precision not in ("no", "bf16"):
        raise UserError(
            f"DeepSpeed works with loop.mixed_precision=bf16 or no; got {precision}. Use one of "
            "these, or launch with training/accelerate/ddp.yaml."
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launch configuration asks for DeepSpeed, which is not installed. Install it with "
            f"`pip install 'latentdiff[deepspeed]'`, or {_INSTEAD}."
        )


def let_cpus_divide(patience: timedelta, meeting: str | None) -> None:
    """Let Accelerate use DeepSpeed on CPUs (gloo), where it would leave it out.

    Accelerate joins the processes as CPUs do and is then told what they are; it must not be asked
    for a CPU again, so ACCELERATE_USE_CPU is taken back.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if PartialState(cpu=True, timeout=patience, init_method=meeting).num_processes > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    os.environ.pop("ACCELERATE_USE_CPU", None)


def has_engine(accelerator: Accelerator) -> bool:
    """Whether this run's steps are DeepSpeed's."""
    return accelerator.deepspeed_plugin is not None


def arithmetic(accelerator: Accelerator) -> str:
    """The precision of a pass; Accelerate itself only knows DeepSpeed's."""
    if has_engine(accelerator):
        return accelerator.deepspeed_plugin.arithmetic
    return accelerator.mixed_precision


def prepare_engine(
    accelerator: Accelerator, unet: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float
) -> tuple[nn.Module, Any]:
    """`accelerator.prepare` for ZeRO-2. Returns: the engine, and its optimizer.

    Raises: UserError: an optimizer that needs whole matrices, or weights not laid out in rows.
    """
    if type(optimizer) is not torch.optim.AdamW:
        raise UserError(
            "DeepSpeed steps flat pieces of many weights at once, which only optimizer.kind=adamw "
            f"can; got {type(optimizer).__name__}. Use adamw, or launch with "
            "training/accelerate/ddp.yaml."
        )
    if any(not p.is_contiguous() for p in unet.parameters()):
        raise UserError(
            "model.channels_last=true does not survive DeepSpeed's flat weights. Set "
            "model.channels_last=false, or launch with training/accelerate/ddp.yaml."
        )
    accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = clip_norm
    if arithmetic(accelerator) == "bf16":
        unet.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(unet.forward)
    engine, prepared = accelerator.prepare(unet, optimizer)
    # The engine looks for gradients that are not finite in float16 only, unless it is told to.
    engine.optimizer.check_grad_overflow = True
    return engine, prepared


class EngineDescent(Descent):
    """A descent whose steps the engine makes: it clips, and leaves out what is not finite."""

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it a backward pass is not the step's last (pieces are exchanged all the same)."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def _backward(self, share: Tensor) -> None:
        self._engine.backward(share)

    def _step(self, number: int) -> Tensor:
        set_learning_rate(self.optimizer.optimizer, self.rate(number))
        self._engine.step()
        left_out, norm = self._engine.optimizer.overflow, self._engine.get_global_grad_norm()
        norm = math.nan if left_out or norm is None else norm
        return torch.as_tensor(norm, device=self._engine.device)

    @property
    def _engine(self) -> Any:
        return self.model


def descent_kind(accelerator: Accelerator) -> type[Descent]:
    """The descent of this launch."""
    return EngineDescent if has_engine(accelerator) else Descent


def is_divided(module: nn.Module) -> bool:
    """Whether a module's optimizer works on pieces of its weights."""
    return any(hasattr(parameter, "_hp_mapping") for parameter in module.parameters())


def gathered_moments(accelerator: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """`optimizer.named_state` of divided moments. All processes must call this.

    Returns: whole moments by name on the first process, put together one after the other; the
             others, which write nothing, get empty ones.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    pieces = _engine_optimizer(accelerator)
    if not pieces.optimizer.state:
        return {}
    _name_moments(pieces)
    first = process_rank() == 0
    count = next(iter(pieces.optimizer.state.values()))["step"]
    found = {}
    for name, parameter in _trained(module):
        found[f"step/{name}"] = torch.as_tensor(count, dtype=torch.float32).cpu().clone()
        for key in _MOMENTS:
            value = safe_get_full_optimizer_state(parameter, key)
            found[f"{key}/{name}"] = value.cpu() if first else torch.empty(0)
    return found


def divide_state(
    accelerator: Accelerator, module: nn.Module, moments: Mapping[str, Tensor]
) -> None:
    """Give every process its piece of stored moments, and of the weights that the module has."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for _, parameter in _trained(module):
        safe_set_full_fp32_param(parameter, parameter.detach())
    if not moments:
        return
    count = next(value for key, value in moments.items() if key.startswith("step/"))
    pieces = _engine_optimizer(accelerator)
    fused = bool(pieces.optimizer.defaults.get("fused"))
    for piece in pieces.single_partition_of_fp32_groups:
        state = {key: torch.zeros_like(piece) for key in _MOMENTS}
        state["step"] = count.to(piece.device if fused else "cpu").clone()
        pieces.optimizer.state[piece] = state
    _name_moments(pieces)
    for name, parameter in _trained(module):
        for key in _MOMENTS:
            value = moments[f"{key}/{name}"].to(parameter.device)
            safe_set_full_optimizer_state(parameter, value, key)


def _engine_optimizer(accelerator: Accelerator) -> Any:
    """DeepSpeed's optimizer, whose `optimizer` is the one that steps the flat pieces."""
    return accelerator.deepspeed_engine_wrapped.engine.optimizer


def _name_moments(pieces: Any) -> None:
    """Let DeepSpeed's optimizer find every weight's moments.

    By itself it looks once, in the first step after the first parameter group: of the others, which
    have no moments by then, it would say that there are none.
    """
    pieces._hp_optimizer_states_linked = False
    pieces._lazy_init_hp_params_optimizer_state()


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
