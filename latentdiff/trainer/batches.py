"""Training batches of latents, each a pure function of (seed, global sample indices)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from latentdiff.diffusion.objective import Draw, ObjectiveConfig, draw
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.trainer.context import ContextCache
from latentdiff.trainer.order import BatchShape, Order, choose_caption
from latentdiff.trainer.transfer import to_device

T = TypeVar("T")


class LatentData(Protocol):
    """What a latent cache or a latent pack offers."""

    shape: tuple[int, int, int]

    def moments_of(self, indices: Sequence[int]) -> Tensor:
        """Return float16 (B, 2C, h, w)."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one picture."""
        ...


class LatentBatch(NamedTuple):
    """Everything that one micro-batch of one process needs."""

    moments: Tensor
    """(B, 2C, h, w) float32 moments of the autoencoder's posterior."""
    context: Tensor
    """(B, tokens, width) text states; of the empty prompt where the condition is dropped."""
    draw: Draw
    """Timesteps and noise."""


class BatchMaker:
    """Builds the micro-batches of one process.

    Args:
        data: latents and captions.
        order: global sample index → dataset index.
        shape: how the global batch is cut up.
        context: captions → text states.
        device: where moments and context go.
    """

    def __init__(
        self,
        data: LatentData | Any,
        order: Order,
        shape: BatchShape,
        context: ContextCache,
        objective: ObjectiveConfig,
        schedule: NoiseSchedule,
        device: torch.device,
    ) -> None:
        self._data, self._order, self.shape, self._context = data, order, shape, context
        self._objective, self._schedule, self._device = objective, schedule, device
        channels, height, width = data.shape
        self._latent_shape = (channels // 2, height, width)

    def __call__(self, step: int, micro: int) -> LatentBatch:
        """Return this process's micro-batch number `micro` of optimizer step `step`."""
        samples = self.shape.samples(step, micro)
        rows = self._order(samples)
        seed = self._order.seed
        random = draw(seed, samples, self._latent_shape, self._objective, self._schedule)
        captions = [
            "" if dropped else choose_caption(self._data.captions(row), seed, n)
            for n, row, dropped in zip(samples, rows, random.drop.tolist(), strict=True)
        ]
        return LatentBatch(
            to_device(self._data.moments_of(rows), self._device).float(),
            to_device(self._context(captions), self._device),
            random._replace(
                eps=to_device(random.eps, self._device),
                posterior_eps=to_device(random.posterior_eps, self._device),
            ),
        )


class Prefetch(Generic[T]):
    """Prepares the next batches in a thread while the current one is used.

    Attributes: waited: seconds that the consumer has spent waiting so far.
    """

    def __init__(
        self, make: Callable[[int, int], T], keys: Iterator[tuple[int, int]], ahead: int = 2
    ) -> None:
        self._make, self._keys, self._ahead = make, keys, ahead
        self.waited = 0.0

    def __iter__(self) -> Iterator[tuple[int, int, T]]:
        """Yield (step, micro, batch) in the order of the keys."""
        waiting: list[tuple[int, int, Future[T]]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            try:
                while True:
                    while len(waiting) < self._ahead and (key := next(self._keys, None)):
                        waiting.append((*key, pool.submit(self._make, *key)))
                    if not waiting:
                        return
                    step, micro, future = waiting.pop(0)
                    started = time.perf_counter()
                    batch = future.result()
                    self.waited += time.perf_counter() - started
                    yield step, micro, batch
            finally:
                for _, _, future in waiting:
                    future.cancel()
