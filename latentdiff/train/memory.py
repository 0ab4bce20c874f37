"""Finding a micro-batch that fits the GPU, with the global batch kept.

Before the first step one micro-batch is computed forwards and backwards, with room taken up for
what only comes with the first update (the optimizer's moments). If memory runs out, the
micro-batch is cut in two and computed in twice as many parts; the global batch, its samples and
their noise stay, only sums round differently.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.train.batches import BatchShape
from latentdiff.train.distributed import share

if TYPE_CHECKING:
    from accelerate import Accelerator

ADVICE = (
    "Set model.gradient_checkpointing=true, loop.mixed_precision=bf16 or optimizer.kind=adamw8bit, "
    "or train on smaller images (data.image_size) or a smaller U-Net."
)


#: What to say when memory runs out in the middle of a run.
RAN_OUT = (
    "the GPU ran out of memory. The last checkpoint is kept: halve loop.batch_size, double "
    "loop.gradient_accumulation (the global batch stays) and go on with --resume. " + ADVICE
)


def smaller(shape: BatchShape) -> BatchShape:
    """The same global batch in smaller parts: half, or a third where there is no half.

    Raises: UserError: one image at a time is what did not fit.
    """
    if shape.per_process == 1:
        raise UserError(
            "the GPU has not enough memory to train on even one image at a time. " + ADVICE
        )
    parts = next(n for n in range(2, shape.per_process + 1) if shape.per_process % n == 0)
    return dataclasses.replace(
        shape,
        per_process=shape.per_process // parts,
        accumulation=shape.accumulation * parts,
    )


def fit_micro_batch(
    attempt: Callable[[int], None],
    shape: BatchShape,
    all_fit: Callable[[bool], bool] = bool,
) -> BatchShape:
    """Cut the micro-batch until it fits.

    Args:
        attempt: computes a micro-batch of so many images; raises torch.OutOfMemoryError.
        all_fit: tells whether it went well on every process; all have to do the same.
    Raises: UserError: not even one image fits.
    """
    while not all_fit(_fits(attempt, shape.per_process)):
        shape = smaller(shape)
    return shape


def _fits(attempt: Callable[[int], None], images: int) -> bool:
    try:
        attempt(images)
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    # Outside the handler: inside it the traceback would keep the failed attempt's tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits


def probe(
    unet: nn.Module,
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    shape: BatchShape,
    accelerator: Accelerator,
) -> BatchShape:
    """Try the micro-batch on this machine's GPU and return the shape that fits.

    Nothing is tried on a CPU, which swaps rather than fails, nor where the weights are sharded:
    there a process that fails half-way would leave the others waiting.

    Args:
        unet: the module itself, not its wrapper.
        loss: number of images → a loss of the size that training will have.
    """
    if accelerator.device.type == "cpu" or accelerator.is_fsdp2:
        return shape

    def attempt(images: int) -> None:
        try:
            room = reserve(unet, optimizer)
            with accelerator.autocast():
                value = loss(images)
            value.backward()
            del room
        finally:
            unet.zero_grad(set_to_none=True)

    return fit_micro_batch(attempt, shape, lambda fits: all(share(fits)))


def halved_note(wanted: int, shape: BatchShape) -> str:
    """A line that says what was changed."""
    return (
        f"note: {wanted} images at a time do not fit into the GPU's memory; each step is "
        f"computed in {shape.accumulation} parts of {shape.per_process}. The global batch stays "
        f"{shape.total}."
    )


def reserve(unet: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Take up as much memory as the optimizer's moments will, unless they are there already.

    Two moments for each trained weight; in 8 bit where the optimizer keeps them so.
    """
    if optimizer.state:
        return []
    dtype: Any = torch.uint8 if getattr(optimizer, "integer_step", False) else None
    trained = [p for p in unet.parameters() if p.requires_grad]
    return [torch.empty_like(p, dtype=dtype) for p in trained for _ in range(2)]
