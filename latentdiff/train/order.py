"""Which image comes when: a pure function of (seed, global sample index).

The run is one endless sequence of samples n = 0, 1, 2, …; sample n belongs to epoch n // N and each
epoch is its own permutation of the N images. Optimizer step k uses the samples [k·G, (k+1)·G), G
the global batch, and every process works on its own slice of them. Nothing is remembered between
steps, so a resumed run needs only k, and another number of processes sees the same samples in the
same steps.

With aspect-ratio buckets every optimizer step takes its images from one bucket, still with no state
and no images left over. Bucket b of n_b images is an endless row of its own permutations, cut into
steps of G samples. Which bucket comes when repeats in cycles of N = Σ n_b steps with exactly n_b of
them for bucket b, so every image is met G times a cycle. Within a cycle the i-th step of bucket b
happens at time (i + u)/n_b, u uniform in [0, 1), and steps are made in the order of time: at any
moment each bucket is within two steps of its fair share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from latentdiff.diffusion.noise import mix
from latentdiff.errors import UserError

#: Keeps the order of buckets independent of what else is drawn from the seed.
_CYCLE_STREAM = 0x4259434C


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

    def part(self, micro: int) -> slice:
        """Which of a step's samples this process computes in one micro-batch."""
        samples = self.samples(0, micro)
        return slice(samples.start, samples.stop)


def rebalance(shape: BatchShape, total: int) -> BatchShape:
    """Cut a global batch of `total` samples up for the processes there are.

    Micro-batches become as large as they may: at most `shape.per_process`.
    Raises: UserError: it cannot be shared out evenly.
    """
    share, rest = divmod(total, shape.processes)
    if rest or not share:
        raise UserError(
            f"--resume: a step of this run is {total} images, which {shape.processes} processes "
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
        epoch_seed: (seed, epoch) → seed of that epoch's permutation.
    """

    indices: Sequence[int] | np.ndarray[Any, Any]
    seed: int
    epoch_seed: Callable[[int, int], int] = mix
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
            generator = torch.Generator().manual_seed(self.epoch_seed(self.seed, epoch))
            self._epochs[epoch] = torch.randperm(len(self.indices), generator=generator).numpy()
        return self._epochs[epoch]


class BucketOrder:
    """Maps global sample indices to dataset indices.

    Args:
        indices: the training set, as indices into the data.
        buckets: the bucket of each of them, a sequence or an array.
        seed: the run's seed.
        total: samples per optimizer step over all processes, G.
    """

    def __init__(self, indices: Sequence[int], buckets: Any, seed: int, total: int) -> None:
        self.seed, self._total = seed, total
        rows, places = np.asarray(indices, np.int64), np.asarray(buckets)
        members = [rows[places == bucket] for bucket in np.unique(places)]
        self._counts = [len(member) for member in members]
        self._starts = [sum(self._counts[:n]) for n in range(len(members))]
        self._orders = [Order(member, mix(seed, n)) for n, member in enumerate(members)]
        self._cycle: tuple[int, np.ndarray[Any, Any]] = (-1, np.empty(0, np.int64))

    def __call__(self, samples: Sequence[int]) -> list[int]:
        """Return the dataset index of each global sample index."""
        return [self._row(n) for n in samples]

    def _row(self, sample: int) -> int:
        step, place = divmod(sample, self._total)
        cycle, at = divmod(step, sum(self._counts))
        slot = int(self._steps(cycle)[at])
        bucket = bisect_right(self._starts, slot) - 1
        number = cycle * self._counts[bucket] + slot - self._starts[bucket]
        return self._orders[bucket]([number * self._total + place])[0]

    def _steps(self, cycle: int) -> np.ndarray[Any, Any]:
        """The steps of a cycle: numbers in the list of all buckets' steps, one after another."""
        if self._cycle[0] != cycle:
            generator = torch.Generator().manual_seed(mix(mix(self.seed, _CYCLE_STREAM), cycle))
            uniform = torch.rand(sum(self._counts), generator=generator, dtype=torch.float64)
            numbers = np.concatenate([np.arange(count) for count in self._counts])
            times = (numbers + uniform.numpy()) / np.repeat(self._counts, self._counts)
            self._cycle = cycle, np.argsort(times, kind="stable")
        return self._cycle[1]


class StreamOrder:
    """For data that only ever come one after another: sample n is whatever comes next.

    Args:    data: has take(samples, step), which fetches one image per sample index.
             seed: the run's seed; noise and captions are still functions of it and n.
             total: samples per optimizer step over all processes.
    """

    def __init__(self, data: Any, seed: int, total: int) -> None:
        self._data, self.seed, self._total = data, seed, total

    def __call__(self, samples: Sequence[int]) -> list[int]:
        """Fetch the next images and return the names under which the data keep them."""
        self._data.take(samples, samples[0] // self._total)
        return list(samples)


def make_order(
    data: Any, indices: Sequence[int], seed: int, total: int
) -> Order | BucketOrder | StreamOrder:
    """The order that suits the data: plain, with buckets, or as they come."""
    if hasattr(data, "take"):
        return StreamOrder(data, seed, total)
    buckets = getattr(data, "buckets", None)
    if buckets is not None:
        own = np.asarray(buckets)[np.asarray(indices, np.int64)]
        if (own != own[0]).any():
            return BucketOrder(indices, own, seed, total)
    return Order(indices, seed)


def by_bucket(data: Any, indices: Sequence[int]) -> list[list[int]]:
    """Positions in `indices`, grouped so that each group has images of one shape."""
    buckets = getattr(data, "buckets", None)
    if buckets is None:
        return [list(range(len(indices)))]
    own = np.asarray(buckets)[np.asarray(indices, np.int64)]
    return [np.flatnonzero(own == bucket).tolist() for bucket in np.unique(own)]
