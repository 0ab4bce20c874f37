"""Training batches of latents, each a pure function of (seed, global sample indices)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from latentdiff.diffusion.noise import mix
from latentdiff.diffusion.objective import Draw, ObjectiveConfig, draw
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.trainer.captions import CaptionConfig, say
from latentdiff.trainer.context import ContextCache
from latentdiff.trainer.order import BatchShape
from latentdiff.trainer.transfer import to_device

T = TypeVar("T")


class SampleOrder(Protocol):
    """Global sample indices → dataset indices; see order and bucket_order."""

    seed: int

    def __call__(self, samples: Sequence[int], /) -> list[int]:
        """Return the dataset index of each global sample index."""
        ...


class LatentData(Protocol):
    """What a latent cache, a latent pack, or pictures encoded on the way offer."""

    def read(self, indices: Sequence[int], seeds: Sequence[int] = (), /) -> tuple[Any, Any]:
        """Return (moments (B, 2C, h, w), mask (B, 1, h, w) or None).

        `seeds` has one number per picture, for what may be random about it.
        """
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
    mask: Tensor | None = None
    """(B, 1, h, w) float32 in [0, 1], the weight of each position in the loss; None: all 1."""


class BatchMaker:
    """Builds the micro-batches of one process.

    Args:
        data: latents and captions.
        order: global sample index → dataset index.
        shape: how the global batch is cut up.
        context: captions → text states.
        device: where moments and context go.
        captions: how captions vary.
    """

    def __init__(
        self,
        data: LatentData | Any,
        order: SampleOrder,
        shape: BatchShape,
        context: ContextCache,
        objective: ObjectiveConfig,
        schedule: NoiseSchedule,
        device: torch.device,
        captions: CaptionConfig | None = None,
    ) -> None:
        self._data, self._order, self.shape, self._context = data, order, shape, context
        self._objective, self._schedule, self._device = objective, schedule, device
        self._captions = captions or CaptionConfig()
        # A CPU that trains has no core to spare; beside a GPU one thread would draw too slowly.
        mine = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = 1 if device.type == "cpu" else min(8, mine)
        self._pool = ThreadPoolExecutor(cores, "noise") if cores > 1 else None

    def __call__(self, step: int, micro: int) -> LatentBatch:
        """Return this process's micro-batch number `micro` of optimizer step `step`."""
        samples = self.shape.samples(step, micro)
        rows = self._order(samples)
        seed = self._order.seed
        moments, mask = self._data.read(rows, [mix(seed, n) for n in samples])
        channels, height, width = moments.shape[1:]
        latent = (channels // 2, height, width)
        random = draw(seed, samples, latent, self._objective, self._schedule, self._pool)
        captions = [
            "" if dropped else say(self._data.captions(row), seed, n, self._captions)
            for n, row, dropped in zip(samples, rows, random.drop.tolist(), strict=True)
        ]
        return LatentBatch(
            to_device(moments, self._device).float(),
            to_device(self._context(captions), self._device),
            random._replace(
                eps=to_device(random.eps, self._device),
                posterior_eps=to_device(random.posterior_eps, self._device),
            ),
            None if mask is None else to_device(mask, self._device).float(),
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
