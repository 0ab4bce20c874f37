"""Images encoded at the step that needs them: no cache, for sets larger than the disk.

Slower than cached latents by the time of the encoder, and equal to them up to the 16 bits in which
those are kept. A stream is read from beginning to end as it is needed, and the images are never
kept either: the `datasets` library fetches a few rows ahead. Which image
comes when is decided by its shuffle buffer, not by the sample index, so such a run is not repeated
bit for bit; noise and captions still follow the sample index.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from latentdiff.data.captions import clean_captions
from latentdiff.data.encoder import Encoder, Painting
from latentdiff.data.images import UnreadableImage
from latentdiff.data.latents import Stored
from latentdiff.data.source import (
    DataConfig,
    Example,
    Skipped,
    Source,
    View,
    decode,
    digest,
    few,
    problems_of,
)
from latentdiff.data.table import bytes_and_path, open_stream
from latentdiff.errors import UserError


class OnlineEncoder:
    """Turns examples into moments and loss masks.

    Attributes: shape: (2C, h, w) of the moments.  key: of weights and transform.
    Raises: UserError: buckets, which need the sizes of all images beforehand; a size that the
        autoencoder cannot take.
    """

    def __init__(
        self, autoencoder: Any, config: DataConfig, device: str | torch.device = "cpu"
    ) -> None:
        if config.buckets:
            raise UserError(
                "data.buckets=true needs the latent cache: set latents.online=false (and "
                "data.streaming=false), or data.buckets=false."
            )
        self._encode = Encoder(autoencoder, config, device)
        self.shape, self.key = self._encode.shapes[0], self._encode.key
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="decode")

    def __call__(self, examples: Sequence[Example | None], seeds: Sequence[int]) -> Stored:
        """Encode examples; None stands for one that cannot be read, which counts nowhere.

        Args:    seeds: one per example, for crop "random"; all 0 where there is none.
        """
        made = list(self._pool.map(self._prepare, examples, seeds or [0] * len(examples)))
        moments = self._encode(torch.stack([pixels for pixels, _ in made])).float()
        if all(mask is None for _, mask in made):
            return Stored(moments, None)
        every = torch.ones(self.shape[1:])
        masks = torch.stack([every if mask is None else mask for _, mask in made])
        return Stored(moments, masks[:, None])

    def pixels(self, examples: Sequence[Example | None], seeds: Sequence[int]) -> list[Painting]:
        """Images and their own masks for inpainting; None stands for one that cannot be read."""
        blank = Painting(torch.zeros(3, *self._encode.sizes[0]), None)

        def pixels(example: Example | None, seed: int) -> Painting:
            return blank if example is None else self._encode.painting(example, seed=seed)

        return list(self._pool.map(pixels, examples, seeds))

    def _prepare(self, example: Example | None, seed: int) -> tuple[Tensor, Tensor | None]:
        if example is None:
            return torch.zeros(3, *self._encode.sizes[0]), torch.zeros(self.shape[1:])
        return self._encode.prepare(example, seed=seed)


class OnlineLatents(View):
    """Reads like `LatentCache`; every read decodes and encodes.

    An image that cannot be read is met with a mask of zeros: it changes nothing.
    """

    def __init__(
        self,
        source: Source,
        autoencoder: Any,
        config: DataConfig,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(source, range(len(source)))
        self._encode = OnlineEncoder(autoencoder, config, device)
        self.shape = self._encode.shape
        self.skipped: list[Skipped] = problems_of(source)
        self._fingerprint = digest("online", source.fingerprint(), self._encode.key)

    def read(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> Stored:
        """Encode many at once; seeds (all 0 by default) place random crops."""
        return self._encode([self._example(int(index)) for index in indices], seeds)

    def pixels(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Painting]:
        """Images cut as `read` has them, and their own masks for inpainting."""
        return self._encode.pixels([self._example(int(index)) for index in indices], seeds)

    def fingerprint(self) -> str:
        """Hash images, transform and autoencoder."""
        return self._fingerprint

    def _example(self, index: int) -> Example | None:
        try:
            return self.source[index]
        except UnreadableImage:
            return None


#: So many rows without a usable image at the start mean that the columns are wrong.
MOST_SKIPPED = 1000


class StreamLatents:
    """Images in the order in which they come, encoded on the way.

    `take` fetches the next images, under the sample indices they are for; `read` and `captions`
    then find them by those.

    Args:
        rank, ranks: this process and how many there are; each gets rows of its own.
        seed: of the shuffling.
    Attributes: shape: (2C, h, w).  skipped: rows left out so far.
    Raises: UserError: nothing there, or a column is missing.
    """

    def __init__(
        self,
        config: DataConfig,
        autoencoder: Any,
        device: str | torch.device = "cpu",
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
    ) -> None:
        self._config, self._encode = config, OnlineEncoder(autoencoder, config, device)
        self.shape = self._encode.shape
        self.skipped: list[Skipped] = []
        self._rank, self._ranks, self._seed = rank, ranks, seed
        if config.mask_files:
            raise UserError(f"{config.mask_files} cannot be used with data.streaming.")
        self._dataset, self._caption_column = open_stream(config)
        self._rows: Iterator[Example] | None = None
        self._held: dict[int, Example] = {}
        words = (config.path, config.split, config.subset, config.revision)
        self._fingerprint = digest("stream", repr(words), self._encode.key)

    def __len__(self) -> int:
        return 0  # nobody knows

    def take(self, samples: Sequence[int], step: int) -> None:
        """Fetch the next images; the first call (at `step`) decides how they are shuffled."""
        if self._rows is None:
            self._rows = self._endless(step)
        self._held = {sample: next(self._rows) for sample in samples}

    def read(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> Stored:
        """Encode images that were taken last."""
        return self._encode([self._held[index] for index in indices], seeds)

    def pixels(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Painting]:
        """Images that were taken last, cut as `read` has them."""
        return self._encode.pixels([self._held[index] for index in indices], seeds)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of an image that was taken last."""
        return self._held[index].captions

    def fingerprint(self) -> str:
        """Hash where the images come from, transform and autoencoder."""
        return self._fingerprint

    def _endless(self, step: int) -> Iterator[Example]:
        from datasets.distributed import split_dataset_by_node

        # Another step, another order: a resumed run does not begin with the same rows again. All
        # processes shuffle alike and then take their own part.
        seed = int(digest(f"{self._seed} {step}")[:8], 16)
        shuffled = self._dataset.shuffle(seed=seed, buffer_size=self._config.shuffle_buffer)
        if self._ranks > 1:
            shuffled = split_dataset_by_node(shuffled, self._rank, self._ranks)
        for epoch in itertools.count():
            shuffled.set_epoch(epoch)
            usable = 0
            for number, row in enumerate(self._read(shuffled)):
                example = self._example(row, f"row {number} of pass {epoch}")
                if example is not None:
                    usable += 1
                    yield example
                elif not usable and number + 1 >= MOST_SKIPPED:
                    break
            if not usable:
                raise UserError(self._nothing())

    def _read(self, rows: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        except UnicodeDecodeError as error:  # and the library does not go on after it
            raise UserError(
                f"{self._config.path} holds a text that is not UTF-8 ({error}). Set "
                "data.streaming=false, which leaves such rows out, or save it as UTF-8."
            ) from error

    def _example(self, row: dict[str, Any], name: str) -> Example | None:
        captions = clean_captions(row.get(self._caption_column))
        data, _ = bytes_and_path(row.get(self._config.image_column))
        try:
            if not captions:
                raise UnreadableImage(name, "no caption")
            if data is None:
                raise UnreadableImage(name, "the row has no image")
            return decode(data, captions, name, self._config)
        except UnreadableImage as error:
            if len(self.skipped) < MOST_SKIPPED:
                self.skipped.append((error.name, error.reason))
            return None

    def _nothing(self) -> str:
        return (
            f"{self._config.path}: 0 usable images for process {self._rank} of {self._ranks} "
            f"({few(self.skipped[-3:]) or 'it got no rows'})."
        )
