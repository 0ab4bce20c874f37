"""Training batches of latents, each a pure function of (seed, global sample indices).

Latents, text states and random numbers of the next batches are put together in a thread. Which of
an image's captions is used, in which order its tags come and which are left out, is drawn anew for
every global sample index and from it alone, so a resumed run uses the same texts.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from latentdiff.diffusion.noise import mix
from latentdiff.diffusion.objective import Draw, ObjectiveConfig, draw
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.train.order import BatchShape, BucketOrder, Order, StreamOrder

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
        )

    def trial(self, count: int) -> LatentBatch:
        """A batch of `count` empty images, with shapes as in training; nothing is read."""
        return LatentBatch(
            torch.zeros(count, *self._data.shape, device=self._device),
            to_device(self._context([""]), self._device).repeat_interleave(count, dim=0),
            self._draw(0, range(count), self._data.shape),
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
