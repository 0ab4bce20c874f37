"""Processes, and weights in shards (FSDP2): every process keeps its own rows of each weight.

A sharded tensor is a DTensor: rows [a, b) of its first dimension lie here, the others on other
processes. Each unit of `UNITS` gathers its weights for its own forward and backward pass and gives
them up afterwards; the optimizer and the moving average only ever touch the local rows.

Accelerate is started so that processes either know of each other or refuse to run. Precision is set
here and nowhere else: copies and one process compute under autocast, shards get the same type for
what they gather (see `fsdp_plugin`).

Source: Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from latentdiff.errors import UserError
from latentdiff.precision import resolve_precision
from latentdiff.train.rendezvous import init_method

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def process_rank() -> int:
    """This process, 0 … count − 1; 0 before processes have joined."""
    return distributed.get_rank() if _joined() else 0


def process_count() -> int:
    """How many processes have joined; 1 without any other."""
    return distributed.get_world_size() if _joined() else 1


def share(value: T) -> list[T]:
    """What every process gives here, in order of rank; waits until all have given theirs."""
    if process_count() == 1:
        return [value]
    found: list[T | None] = [None] * process_count()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def on_first(action: Callable[[], T]) -> T | None:
    """Run an action on the first process while the others wait; for all processes.

    Returns: its result there, None elsewhere.
    Raises:  UserError: on all processes, what it raised on the first.
    """
    result, problem = None, None
    if process_rank() == 0:
        try:
            result = action()
        except UserError as error:
            problem = error
    if problem := share(problem)[0]:
        raise problem
    return result


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


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


def let_cpus_shard(patience: timedelta, rendezvous_url: str | None) -> None:
    """Make Accelerate shard on CPUs (gloo), where it would fall back to copies without a word.

    It decides by the kind of device whether FSDP applies and leaves CPUs out; several of them say
    here that they are XPUs. The device itself stays `cpu`.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if PartialState(cpu=True, timeout=patience, init_method=rendezvous_url).num_processes > 1:
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
    _check_shardable(unet)
    plugin = accelerator.state.fsdp_plugin
    found = {type(module).__name__ for module in unet.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in UNITS if name in found]
    # The frozen frequencies stay whole and in 32 bit.
    plugin.ignored_modules = [m for n, m in unet.named_children() if n == "time_proj"]
    model, prepared = accelerator.prepare(unet, optimizer)
    if (dtype := _DTYPES[accelerator.mixed_precision]) is not None:
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)
    return model, prepared


def _check_shardable(unet: nn.Module) -> None:
    frozen = [n for n, p in unet.named_parameters() if not p.requires_grad]
    if any(not name.startswith("time_proj.") for name in frozen):
        raise UserError(
            "finetune.kind=full or inpainting can be sharded: the others train so little that "
            "copies take no more memory. Launch with training/accelerate/ddp.yaml."
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


def release(module: nn.Module) -> None:
    """Give up gathered weights, so that the next pass gathers them as they are then."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def gather_state(module: nn.Module) -> dict[str, Any]:
    """A sharded module's whole state dict, on the CPU of the first process; empty elsewhere.

    Every process must call this. Of a module that is not sharded it may be the weights themselves.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=whole)


#: While one process encodes images the others wait longer than the default 10 minutes.
_PATIENCE = timedelta(hours=6)
#: What `accelerate launch` and torchrun leave in the environment of those whom they start.
_MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
#: The option of `accelerate launch` for how many threads a process has.
_THREADS = "num_cpu_threads_per_process"
#: How launchers tell a process how many there are.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_processes(mixed_precision: str, cpu: bool = False, shards: bool = False) -> Accelerator:
    """Join the other processes of this launch, on the GPU if there is one and `cpu` is not set.

    Args:   shards: whether the caller can train a model that is divided among processes.
    Raises: UserError: the launcher started several processes that each would train alone, or asks
            for what the caller cannot do.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    # Accelerate keeps the first precision for good; a notebook may train again with another one.
    AcceleratorState._reset_state(reset_partial_state=False)
    # Without cpu=True two processes launched on a machine without a GPU would not find each other.
    cpu = cpu or not torch.accelerator.is_available()
    rendezvous_url = init_method()
    patience = InitProcessGroupKwargs(init_method=rendezvous_url, timeout=_PATIENCE)
    device = "cpu" if cpu else torch.accelerator.current_accelerator()
    precision = resolve_precision(mixed_precision, device or "cpu")
    sharding = wants_sharding()
    _check_launch(sharding, shards)
    if sharding and cpu:
        let_cpus_shard(_PATIENCE, rendezvous_url)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        fsdp_plugin=fsdp_plugin(precision) if sharding else None,
        kwargs_handlers=[patience],
    )
    check_together(accelerator.num_processes)
    if accelerator.device.type == "cpu":
        take_cores()
    _check_accumulation(accelerator.gradient_accumulation_steps)
    return accelerator


def _check_launch(sharding: bool, shards: bool) -> None:
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if (sharding or deepspeed) and not shards:
        raise UserError(
            "this script trains copies, not shards: its networks are small. Launch it with "
            "training/accelerate/ddp.yaml, or with `python` on one process."
        )
    if deepspeed:
        raise UserError(
            "the launch configuration asks for DeepSpeed, which is not supported; FSDP2 shards "
            "the same. Launch with training/accelerate/fsdp2_shard_grad_op.yaml (as ZeRO stage 2 "
            "does) or training/accelerate/fsdp2_full_shard.yaml (stage 3)."
        )


def take_cores() -> None:
    """Share out this machine's cores where the launcher gave each process one unasked.

    `accelerate launch` and torchrun set OMP_NUM_THREADS=1 unless they find it set, so a run on a
    CPU would have one core of eight. What a person set stands.
    """
    import psutil

    if os.environ.get("OMP_NUM_THREADS") != "1" or not any(name in os.environ for name in _MARKS):
        return
    try:
        launcher = psutil.Process().parent()
        if launcher is None or "OMP_NUM_THREADS" in launcher.environ():
            return
        if any(_THREADS in word.replace("-", "_") for word in launcher.cmdline()):
            return
    except psutil.Error:
        return
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _check_accumulation(steps: int) -> None:
    if steps != 1:
        raise UserError(
            f"the launch configuration says gradient_accumulation_steps={steps}, which would "
            "divide every gradient a second time. Remove it there and set "
            f"loop.gradient_accumulation={steps}."
        )


def check_together(num_processes: int) -> None:
    """Compare what the launcher says with what Accelerate found. Raises: UserError."""
    for name in _SIZES:
        launched = os.environ.get(name, "")
        if launched.isdigit() and int(launched) > 1 and int(launched) != num_processes:
            raise UserError(
                f"{launched} processes were launched ({name}={launched}), but this one believes "
                f"that there are {num_processes}: each would train a model of its own in the same "
                "folder. Launch with `accelerate launch --multi_gpu --num_processes "
                f"{launched} …` (on a CPU too, with ACCELERATE_USE_CPU=true), or one process."
            )


def is_first_process() -> bool:
    """Whether this process should print; works before Accelerate is started."""
    return os.environ.get("RANK", "0") == "0"
