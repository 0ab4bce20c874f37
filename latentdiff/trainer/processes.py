"""Starting Accelerate so that processes either know of each other or refuse to run.

Precision is set here and nowhere else: copies and one process compute under autocast, shards get
the same type for what they gather (see `sharding.fsdp_plugin`).
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from latentdiff.errors import UserError
from latentdiff.precision import settle_precision
from latentdiff.trainer.rendezvous import attempt, init_method
from latentdiff.trainer.sharding import fsdp_plugin, let_cpus_shard, wants_sharding

if TYPE_CHECKING:
    from accelerate import Accelerator

#: While one process encodes pictures the others wait longer than the default 10 minutes.
_PATIENCE = timedelta(hours=6)
#: What `accelerate launch` and torchrun leave in the environment of those whom they start.
_MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
#: The option by which a person tells `accelerate launch` how many threads a process has.
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
    meeting = init_method()
    patience = InitProcessGroupKwargs(init_method=meeting, timeout=_PATIENCE)
    device = "cpu" if cpu else torch.accelerator.current_accelerator()
    precision = settle_precision(mixed_precision, device or "cpu")
    sharding = wants_sharding()
    _check_launch(sharding, shards)
    if sharding and cpu:
        let_cpus_shard(_PATIENCE, meeting)
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


def was_restarted() -> bool:
    """Whether the launcher has started this run again after a failure (its `max_restarts`).

    Of a failure on another machine it is known only once the processes have met.
    """
    return attempt() > 1 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


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
