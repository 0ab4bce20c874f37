"""Which image comes when, and what a batch holds: pure functions of (seed, global sample index).

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

Latents, text states and random numbers of the next batches are put together in a thread. Which of
an image's captions is used, in which order its tags come and which are left out, is drawn anew for
every global sample index and from it alone, so a resumed run uses the same texts.
"""

from __future__ import annotations

import os
import random
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.noise import mix
from latentdiff.diffusion.objective import Draw, ObjectiveConfig, draw
from latentdiff.diffusion.schedule import NoiseSchedule
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


T = TypeVar("T")

# Keep the choice of captions and their tags independent of the noise, drawn from (seed, n) too.
_CAPTION_STREAM, _TAG_STREAM = 0x43415054, 0x54414753


@dataclass(frozen=True)
class CaptionConfig:
    """How captions vary from one use of an image to the next; one of several is drawn anyway."""

    shuffle_tags: bool = False
    """Put the parts between commas into another order each time ("1girl, red hair, smile")."""
    keep_tags: int = 0
    """So many first parts stay where they are and are never dropped."""
    tag_dropout: float = 0.0
    """Share of the other parts that is left out each time; 0 … 1."""
    prefix: str = ""
    """Put before each caption as it is, for example "sks style, "; it is never moved or dropped."""
    suffix: str = ""
    """Put after each caption."""

    def validate(self) -> list[str]:
        """List what is out of range."""
        problems = []
        if self.keep_tags < 0:
            problems.append(f"keep_tags must be at least 0; got {self.keep_tags}.")
        if not 0 <= self.tag_dropout <= 1:
            problems.append(f"tag_dropout must lie in 0 … 1; got {self.tag_dropout}.")
        return problems


def choose_caption(captions: Sequence[str], seed: int, sample: int) -> str:
    """Choose one of an image's captions for a global sample index."""
    if len(captions) == 1:
        return captions[0]
    return captions[mix(mix(seed, _CAPTION_STREAM), sample) % len(captions)]


def say(captions: Sequence[str], seed: int, sample: int, config: CaptionConfig) -> str:
    """The caption of an image for a global sample index; at least one part of it is left."""
    caption = choose_caption(captions, seed, sample)
    return config.prefix + _shuffled(caption, seed, sample, config) + config.suffix


def plainly(captions: Sequence[str], config: CaptionConfig) -> str:
    """The first caption of an image as validation takes it: with prefix and suffix, all parts."""
    return config.prefix + captions[0] + config.suffix


def _shuffled(caption: str, seed: int, sample: int, config: CaptionConfig) -> str:
    if not config.shuffle_tags and not config.tag_dropout:
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    if len(tags) < 2:
        return caption
    draws = random.Random(mix(mix(seed, _TAG_STREAM), sample))
    first, rest = tags[: config.keep_tags], tags[config.keep_tags :]
    drawn = [(draws.random(), draws.random(), tag) for tag in rest]
    kept = [(place, tag) for fate, place, tag in drawn if fate >= config.tag_dropout]
    if config.shuffle_tags:
        kept.sort(key=lambda item: item[0])
    return ", ".join([*first, *(tag for _, tag in kept)] or tags[:1])


#: Captions per call of the text encoder, always, on a CPU and elsewhere; see ContextCache.
CHUNK, LARGE_CHUNK = 8, 64


class ContextCache:
    """Text states of captions, the most recently used ones kept.

    The text encoder always gets the same number of captions (the last one repeated if need be).
    Matrix products of another size round differently, and after a resume the cache is empty: if the
    size were that of whatever is missing, the context would depend on the history of the run.

    Args:
        encode: captions → text states (B, tokens, width) of the frozen text encoder.
        device: where the text encoder is.
        max_bytes: how much memory the kept states may take.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], Tensor],
        device: torch.device | None = None,
        max_bytes: int = 2**30,
    ) -> None:
        self._encode_chunk, self._max_bytes = encode, max_bytes
        device = device or torch.device("cpu")
        self._chunk = CHUNK if device.type == "cpu" else LARGE_CHUNK
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        # Validation encodes its prompts while the batch thread is at work.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return the context of each caption, (B, tokens, width)."""
        with self._lock:
            missing = [c for c in dict.fromkeys(captions) if c not in self._kept]
            states = {c: self._kept[c] for c in captions if c in self._kept}
            for start in range(0, len(missing), self._chunk):
                states |= self._encode(missing[start : start + self._chunk])
            for caption, state in states.items():
                self._kept[caption] = state
                self._kept.move_to_end(caption)
            self._shrink()
        return torch.stack([states[caption] for caption in captions])

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> dict[str, Tensor]:
        padded = captions + captions[-1:] * (self._chunk - len(captions))
        # Copies: a view would keep the whole chunk's memory alive.
        # Validation asks under autocast, the batch thread does not; a kept state must not depend
        # on who asked first, or a resumed run would differ.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            rows = [row.clone() for row in self._encode_chunk(padded)[: len(captions)]]
        return dict(zip(captions, rows, strict=True))

    def _shrink(self) -> None:
        size = next(iter(self._kept.values())).nbytes if self._kept else 0
        while len(self._kept) > 1 and len(self._kept) * size > self._max_bytes:
            self._kept.popitem(last=False)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; on a GPU through page-locked memory.

    CUDA copies asynchronously from page-locked memory only; from other memory the thread would
    stand still until the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class LatentBatch(NamedTuple):
    """Everything that one micro-batch of one process needs."""

    moments: Tensor
    """(B, 2C, h, w) float32 moments of the autoencoder's posterior."""
    context: Tensor
    """What the network takes third: (B, tokens, width) text states, or token ids (B, tokens) where
    it has the text encoder in it; of the empty prompt where the condition is dropped."""
    draw: Draw
    """Timesteps and noise."""
    mask: Tensor | None = None
    """(B, 1, h, w) float32 in [0, 1], the weight of each position in the loss; None: all 1."""
    extra: Tensor | None = None
    """(B, E, h, w) float32, what the network takes in channels after those of x_t; None: nothing.
    """


class BatchMaker:
    """Builds the micro-batches of one process.

    Args:
        data: a latent cache, or images encoded on the way. It has shape, (2C, h, w) of most images;
            read(indices, seeds) → (moments (B, 2C, h, w), mask (B, 1, h, w) or None), with a number
            per image for what may be random about it; captions(index) → those of one image.
        order: global sample index → dataset index.
        shape: how the global batch is cut up.
        context: captions → what the network takes third: text states, or token ids.
        device: where moments and context go.
        captions: how captions vary.
        extra: (data, indices, seeds) → what else the U-Net is given, (B, E, h, w); None: nothing.
    """

    def __init__(
        self,
        data: Any,
        order: Order | BucketOrder | StreamOrder,
        shape: BatchShape,
        context: Callable[[list[str]], Tensor],
        objective: ObjectiveConfig,
        schedule: NoiseSchedule,
        device: torch.device,
        captions: CaptionConfig | None = None,
        extra: Callable[[Any, Sequence[int], Sequence[int]], Tensor] | None = None,
    ) -> None:
        self._data, self._order, self.shape, self._context = data, order, shape, context
        self._objective, self._schedule, self._device = objective, schedule, device
        self._captions, self._extra = captions or CaptionConfig(), extra
        # A CPU that trains has no core to spare; beside a GPU one thread would draw too slowly.
        mine = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = 1 if device.type == "cpu" else min(8, mine)
        self._pool = ThreadPoolExecutor(cores, "noise") if cores > 1 else None

    def __call__(self, step: int, micro: int) -> LatentBatch:
        """Return this process's micro-batch number `micro` of optimizer step `step`."""
        samples = self.shape.samples(step, micro)
        rows = self._order(samples)
        seed = self._order.seed
        seeds = [mix(seed, n) for n in samples]
        moments, mask = self._data.read(rows, seeds)
        random = self._draw(seed, samples, moments.shape[1:])
        captions = [
            "" if dropped else say(self._data.captions(row), seed, n, self._captions)
            for n, row, dropped in zip(samples, rows, random.drop.tolist(), strict=True)
        ]
        return LatentBatch(
            to_device(moments, self._device).float(),
            to_device(self._context(captions), self._device),
            random,
            None if mask is None else to_device(mask, self._device).float(),
            None if self._extra is None else self._extra(self._data, rows, seeds),
        )

    def trial(self, count: int) -> LatentBatch:
        """A batch of `count` empty images, with shapes as in training; nothing is read."""
        channels, height, width = self._data.shape
        extra = torch.zeros(count, 1 + channels // 2, height, width, device=self._device)
        return LatentBatch(
            torch.zeros(count, *self._data.shape, device=self._device),
            to_device(self._context([""]), self._device).repeat_interleave(count, dim=0),
            self._draw(0, range(count), self._data.shape),
            extra=None if self._extra is None else extra,
        )

    def _draw(self, seed: int, samples: Sequence[int], shape: Sequence[int]) -> Draw:
        latent = (shape[0] // 2, *shape[1:])
        random = draw(seed, samples, latent, self._objective, self._schedule, self._pool)
        eps, posterior_eps = (
            to_device(e, self._device) for e in (random.eps, random.posterior_eps)
        )
        return random._replace(eps=eps, posterior_eps=posterior_eps)


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
