"""FSDP2: every process keeps only its own rows of each weight, moment and average.

A sharded tensor is a DTensor: rows [a, b) of its first dimension lie here, the others on other
processes. Each unit of `UNITS` gathers its weights for its own forward and backward pass and gives
them up afterwards; the optimizer and the moving average only ever touch the local rows.

Source: Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.trainer.muon import Muon
from latentdiff.trainer.ranks import process_rank

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Classes of the U-Net that gather their weights together; what is outside them forms one unit.
UNITS = ("ResnetBlock", "SpatialTransformer", "Downsample", "Upsample")
_DTYPES = {"no": None, "bf16": torch.bfloat16}


def wants_sharding() -> bool:
    """Whether the launch configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def fsdp_plugin(precision: str) -> Any:
    """Accelerate's plugin, with the precision that the run has and all else from the launch.

    Weights are gathered in the arithmetic's type and gradients summed in 32 bit. Inputs are not
    cast: the timesteps of flow have no room in 16 bit; autocast casts what a product needs.
    Raises: UserError: FSDP1, or fp16.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"sharding works with FSDP2; the launch configuration says fsdp_version={version}. "
            "Set `fsdp_version: 2` as training/accelerate/fsdp2_full_shard.yaml does."
        )
    if precision not in _DTYPES:
        raise UserError(
            f"sharding works with loop.mixed_precision=bf16 or no; got {precision}. Use one of "
            "these, or launch with training/accelerate/ddp.yaml."
        )
    policy = MixedPrecisionPolicy(
        param_dtype=_DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if precision == "no":
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)


def let_cpus_shard(patience: timedelta, meeting: str | None) -> None:
    """Make Accelerate shard on CPUs (gloo), where it would fall back to copies without a word.

    It decides by the kind of device whether FSDP applies and leaves CPUs out; several of them say
    here that they are XPUs. The device itself stays `cpu`.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if PartialState(cpu=True, timeout=patience, init_method=meeting).num_processes > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def prepare(
    accelerator: Accelerator, unet: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, Any]:
    """`accelerator.prepare` for one process, copies (DDP) or shards (FSDP2), as the launch says.

    Sharding changes the module itself, so the returned one is the one given.
    Raises:  UserError: something that cannot be sharded is configured.
    """
    if not accelerator.is_fsdp2:
        model, prepared = accelerator.prepare(unet, optimizer)
        return model, prepared
    _check_shardable(unet, optimizer)
    plugin = accelerator.state.fsdp_plugin
    found = {type(module).__name__ for module in unet.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in UNITS if name in found]
    # The frozen frequencies stay whole and in 32 bit.
    plugin.ignored_modules = [m for n, m in unet.named_children() if n == "time_proj"]
    model, prepared = accelerator.prepare(unet, optimizer)
    if (dtype := _DTYPES[accelerator.mixed_precision]) is not None:
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)
    return model, prepared


def _check_shardable(unet: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, Muon):
        raise UserError(
            "optimizer.kind=muon needs whole matrices, and a sharded process has only some of "
            "their rows. Use optimizer.kind=adamw, or launch with training/accelerate/ddp.yaml."
        )
    frozen = [n for n, p in unet.named_parameters() if not p.requires_grad]
    if any(not name.startswith("time_proj.") for name in frozen):
        raise UserError(
            "finetune.kind=full alone can be sharded: the others train so little that copies "
            "take no more memory. Launch with training/accelerate/ddp.yaml."
        )
    if any(not p.is_contiguous() for p in unet.parameters()):
        raise UserError(
            "model.channels_last=true cannot be sharded: rows must lie one after the other. "
            "Set model.channels_last=false, or launch with training/accelerate/ddp.yaml."
        )


def is_sharded(value: Tensor | nn.Module) -> bool:
    """Whether a tensor, or any weight of a module, is spread over processes."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:  # seconds to import, and without it there can be no such tensor
        return False
    tensors = [value] if isinstance(value, Tensor) else value.parameters()
    return any(isinstance(tensor, module.DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """The rows that this process has, sharing memory; a plain tensor is all here."""
    value: Any = tensor.detach()
    return value.to_local() if is_sharded(value) else value


def whole(tensor: Tensor) -> Tensor:
    """All rows. Every process must call this for a sharded tensor."""
    value: Any = tensor.detach()
    return value.full_tensor() if is_sharded(value) else value


def rows(tensor: Any) -> slice | None:
    """Which rows this process has; None when all of them.

    n rows over k processes lie as `torch.chunk` cuts them: ⌈n/k⌉ each as long as there are some.
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Shard

    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            size = math.ceil(len(tensor) / tensor.device_mesh.size(axis))
            start = min(tensor.device_mesh.get_local_rank(axis) * size, len(tensor))
            return slice(start, min(start + size, len(tensor)))
    return None


def is_first_copy(tensor: Any) -> bool:
    """Whether this process is the one to save its rows: of several copies the first."""
    if not is_sharded(tensor):
        return process_rank() == 0
    from torch.distributed.tensor import Shard

    mesh = tensor.device_mesh
    others = [
        i for i, placement in enumerate(tensor.placements) if not isinstance(placement, Shard)
    ]
    return all(mesh.get_local_rank(axis) == 0 for axis in others)


def placed_like(value: Tensor, example: Any) -> Tensor:
    """Say of local rows that they are those of a tensor spread as `example` is."""
    if not is_sharded(example):
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value,
        example.device_mesh,
        example.placements,
        run_check=False,
        shape=example.shape,
        stride=example.stride(),
    )


def release(module: nn.Module) -> None:
    """Give up gathered weights, so that the next pass gathers them as they are then."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def gather_state(module: nn.Module, keep: bool) -> Mapping[str, Tensor]:
    """A copy of a module's whole state dict on the CPU. Every process must call this.

    Args:    keep: whether this process wants it; the others get an empty one.
    """
    found: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        full = whole(value)
        if keep:
            found[name] = full.to("cpu", copy=True)
    return found
