"""Sample order with aspect-ratio buckets: every optimizer step takes its pictures from one bucket.

Still a pure function of (seed, global sample index), with no state and no pictures left over.
Bucket b of n_b pictures is an endless row of its own permutations, cut into steps of G samples
(G the global batch). Which bucket comes when repeats in cycles of N = Σ n_b steps with exactly n_b
of them for bucket b, so every picture is met G times a cycle. Within a cycle the i-th step of
bucket b happens at time (i + u)/n_b, u uniform in [0, 1), and steps are made in the order of time:
at any moment each bucket is within two steps of its fair share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from latentdiff.diffusion.noise import mix
from latentdiff.trainer.order import Order

_CYCLE_STREAM = 0x4259434C


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

    Args:    data: has take(samples, step), which fetches one picture per sample index.
             seed: the run's seed; noise and captions are still functions of it and n.
             total: samples per optimizer step over all processes.
    """

    def __init__(self, data: Any, seed: int, total: int) -> None:
        self._data, self.seed, self._total = data, seed, total

    def __call__(self, samples: Sequence[int]) -> list[int]:
        """Fetch the next pictures and return the names under which the data keep them."""
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
    """Positions in `indices`, grouped so that each group has pictures of one shape."""
    buckets = getattr(data, "buckets", None)
    if buckets is None:
        return [list(range(len(indices)))]
    own = np.asarray(buckets)[np.asarray(indices, np.int64)]
    return [np.flatnonzero(own == bucket).tolist() for bucket in np.unique(own)]
