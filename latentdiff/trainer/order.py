"""Which picture comes when: a pure function of (seed, global sample index).

The run is one endless sequence of samples n = 0, 1, 2, …; sample n belongs to epoch n // N and each
epoch is its own permutation of the N pictures. Optimizer step k uses the samples
[k·G, (k+1)·G), G the global batch, and every process works on its own slice of them. Nothing is
remembered between steps, so a resumed run needs only k, and another number of processes sees the
same samples in the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from latentdiff.diffusion.noise import mix
from latentdiff.errors import UserError

# Keeps the choice of captions independent of the noise, which is drawn from (seed, n) as well.
_CAPTION_STREAM = 0x43415054


@dataclass(frozen=True)
class BatchShape:
    """How the global batch of one optimizer step is cut up."""

    per_process: int
    """Samples that one process computes at a time (the micro-batch)."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    processes: int = 1
    """Number of data-parallel processes."""
    rank: int = 0
    """This process, 0 … processes − 1."""

    @property
    def total(self) -> int:
        """Samples per optimizer step over all processes, G."""
        return self.per_process * self.accumulation * self.processes

    def samples(self, step: int, micro: int) -> range:
        """Global sample indices that this process computes in one micro-batch of a step."""
        block = micro * self.processes + self.rank
        start = step * self.total + block * self.per_process
        return range(start, start + self.per_process)


def recut(shape: BatchShape, total: int) -> BatchShape:
    """Cut a global batch of `total` samples up for the processes there are.

    Micro-batches become as large as they may: at most `shape.per_process`.
    Raises: UserError: it cannot be shared out evenly.
    """
    share, rest = divmod(total, shape.processes)
    if rest or not share:
        raise UserError(
            f"--resume: a step of this run is {total} pictures, which {shape.processes} processes "
            "cannot share evenly. Launch it on a number of processes that divides "
            f"{total}."
        )
    size = next(n for n in range(min(shape.per_process, share), 0, -1) if share % n == 0)
    return replace(shape, per_process=size, accumulation=share // size)


@dataclass
class Order:
    """Maps global sample indices to dataset indices.

    Args:
        indices: the training set, as indices into the data.
        seed: the run's seed.
    """

    indices: Sequence[int] | np.ndarray[Any, Any]
    seed: int
    _epochs: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, samples: Sequence[int]) -> list[int]:
        """Return the dataset index of each global sample index."""
        count = len(self.indices)
        return [int(self.indices[self._permutation(n // count)[n % count]]) for n in samples]

    def _permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        if epoch not in self._epochs:
            # A batch may span two epochs, or several of a tiny set; older ones never come back.
            while len(self._epochs) > 8:
                del self._epochs[min(self._epochs)]
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._epochs[epoch] = torch.randperm(len(self.indices), generator=generator).numpy()
        return self._epochs[epoch]


def choose_caption(captions: Sequence[str], seed: int, sample: int) -> str:
    """Choose one of a picture's captions for a global sample index."""
    if len(captions) == 1:
        return captions[0]
    return captions[mix(mix(seed, _CAPTION_STREAM), sample) % len(captions)]
