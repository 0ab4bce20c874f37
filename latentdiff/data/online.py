"""Pictures encoded at the step that needs them: no cache, for sets larger than the disk.

Slower than cached latents by the time of the encoder, and equal to them up to the 16 bits in which
those are kept. A stream is read from beginning to end as it is needed, and the pictures are never
kept either: the `datasets` library fetches a few rows ahead. Which picture
comes when is decided by its shuffle buffer, not by the sample index, so such a run is not repeated
bit for bit; noise and captions still follow the sample index.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.data.captions import choose_caption_column, clean_captions
from latentdiff.data.images import (
    UnreadableImage,
    latent_mask,
    open_image,
    open_with_alpha,
    to_tensor,
)
from latentdiff.data.latents import (
    Shape,
    Stored,
    cache_key,
    check_sizes,
    digest,
    encode_moments,
    float_type,
)
from latentdiff.data.source import DataConfig, Example, Skipped, Source, few, group_of, problems_of
from latentdiff.data.table import check_links
from latentdiff.errors import UserError, did_you_mean


class OnlineEncoder:
    """Turns examples into moments and loss masks.

    Attributes: shape: (2C, h, w) of the moments.
    Raises: UserError: buckets, which need the sizes of all pictures beforehand; a size that the
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
        self._size = (config.image_size, config.image_size)
        check_sizes(autoencoder, (self._size,))
        self._autoencoder, self._config, self._device = autoencoder.to(device), config, device
        blank = torch.zeros(1, 3, *self._size, device=device, dtype=float_type(autoencoder))
        channels, height, width = encode_moments(autoencoder, blank).shape[1:]
        self.shape: Shape = (channels, height, width)
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="decode")

    def __call__(self, examples: Sequence[Example | None], seeds: Sequence[int]) -> Stored:
        """Encode examples; None stands for one that cannot be read, which counts nowhere.

        Args:    seeds: one per example, for crop "random".
        """
        made = list(self._pool.map(self._prepare, examples, seeds))
        images = torch.stack([image for image, _ in made])
        moments = encode_moments(
            self._autoencoder, images.to(self._device, float_type(self._autoencoder))
        )
        if self._config.loss_mask == "none" and all(e is not None for e in examples):
            return Stored(moments.float(), None)
        return Stored(moments.float(), torch.stack([mask for _, mask in made])[:, None])

    def _prepare(self, example: Example | None, seed: int) -> tuple[Tensor, Tensor]:
        latent, config = self.shape[1:], self._config
        if example is None:
            return torch.zeros(3, *self._size), torch.zeros(latent)
        generator = torch.Generator().manual_seed(seed)
        pixels = to_tensor(
            example.image,
            self._size,
            config.crop,
            background=config.background,
            generator=generator,
        )
        if config.loss_mask == "none":
            return pixels, torch.ones(latent)
        return pixels, self._mask(example, seed, latent)

    def _mask(self, example: Example, seed: int, latent: tuple[int, int]) -> Tensor:
        # The same seed again: the mask is cut where the picture was.
        generator = torch.Generator().manual_seed(seed)
        picture, crop = example.image.size, self._config.crop
        return latent_mask(example.mask, picture, self._size, crop, latent, generator)


class OnlineLatents:
    """Reads like `LatentCache`; every read decodes and encodes.

    A picture that cannot be read is met with a mask of zeros: it changes nothing.
    """

    def __init__(
        self,
        source: Source,
        autoencoder: Any,
        config: DataConfig,
        device: str | torch.device = "cpu",
    ) -> None:
        self._source, self._encode = source, OnlineEncoder(autoencoder, config, device)
        self.shape = self._encode.shape
        self.skipped: list[Skipped] = problems_of(source)
        self._fingerprint = digest("online", source.fingerprint(), cache_key(autoencoder, config))

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> Stored:
        """Encode many at once; seeds (all 0 by default) place random crops."""
        examples = [self._example(int(index)) for index in indices]
        return self._encode(examples, seeds or [0] * len(examples))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one picture."""
        return self._source.captions(index)

    def name(self, index: int) -> str:
        """Return the name of one picture."""
        return self._source.name(index)

    def group(self, index: int) -> str:
        """Return the key that `split` keeps together."""
        return group_of(self._source, index)

    def fingerprint(self) -> str:
        """Hash pictures, transform and autoencoder."""
        return self._fingerprint

    def _example(self, index: int) -> Example | None:
        try:
            return self._source[index]
        except UnreadableImage:
            return None


#: So many rows without a usable picture at the start mean that the columns are wrong.
MOST_SKIPPED = 1000


class StreamLatents:
    """Pictures in the order in which they come, encoded on the way.

    `take` fetches the next pictures, under the sample indices they are for; `read` and `captions`
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
        self._dataset = _open(config)
        self._picture, self._caption = _columns(self._dataset, config)
        self._rows: Iterator[Example] | None = None
        self._held: dict[int, Example] = {}
        words = (config.path, config.split, config.subset, config.revision)
        self._fingerprint = digest("stream", repr(words), cache_key(autoencoder, config))

    def __len__(self) -> int:
        return 0  # nobody knows

    def take(self, samples: Sequence[int], step: int) -> None:
        """Fetch the next pictures; the first call (at `step`) decides how they are shuffled."""
        if self._rows is None:
            self._rows = self._endless(step)
        self._held = {sample: next(self._rows) for sample in samples}

    def read(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> Stored:
        """Encode pictures that were taken last."""
        examples = [self._held[index] for index in indices]
        return self._encode(examples, seeds or [0] * len(examples))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a picture that was taken last."""
        return self._held[index].captions

    def fingerprint(self) -> str:
        """Hash where the pictures come from, transform and autoencoder."""
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
        captions = clean_captions(row.get(self._caption))
        cell = row.get(self._picture)
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        try:
            if not captions:
                raise UnreadableImage(name, "no caption")
            if not isinstance(data, bytes):
                raise UnreadableImage(name, "the row has no picture")
            if self._config.loss_mask == "alpha":
                image, mask = open_with_alpha(data, name, self._config.background)
                return Example(image, captions, name, mask)
            return Example(open_image(data, name, self._config.background), captions, name)
        except UnreadableImage as error:
            if len(self.skipped) < MOST_SKIPPED:
                self.skipped.append((error.name, error.reason))
            return None

    def _nothing(self) -> str:
        return (
            f"{self._config.path}: 0 usable pictures for process {self._rank} of {self._ranks} "
            f"({few(self.skipped[-3:]) or 'it got no rows'})."
        )


def _open(config: DataConfig) -> Any:
    """Open a stream of rows; a local path never touches the network. Raises: UserError."""
    import datasets

    path = config.path or ""
    place = Path(path).expanduser()
    if not place.exists() and path.startswith((".", "/", "~")):
        raise UserError(f"data.path: the folder {path} does not exist.")
    if config.loss_mask == "file":
        raise UserError("data.loss_mask=file cannot be used with data.streaming; alpha can.")
    check_links(place, config)
    try:
        if place.exists():
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
            loaded = datasets.load_dataset(str(place), name=config.subset, streaming=True)
        else:
            loaded = datasets.load_dataset(
                path, name=config.subset, revision=config.revision, streaming=True
            )
    except Exception as error:  # network, permissions, missing repository, broken files …
        where = "in the folder" if place.exists() else "on the Hugging Face hub"
        raise UserError(
            f"the data set {path} cannot be streamed {where}: {type(error).__name__}: {error}"
        ) from error
    if config.split not in loaded:
        raise UserError(
            f"data.split: {path} has no split '{config.split}'; it has {', '.join(loaded)}."
            f"{did_you_mean(config.split, list(loaded))}"
        )
    return _undecoded(loaded[config.split], config)


def _undecoded(dataset: Any, config: DataConfig) -> Any:
    """Leave pictures as file bytes, which our own decoder takes."""
    from datasets import Image

    names = dataset.column_names
    if names is None:  # some formats only say so when they are read
        names = list(next(iter(dataset)))
    if config.image_column not in names:
        raise UserError(
            f"data.image_column: {config.path} has no column '{config.image_column}'; its columns "
            f"are {', '.join(names)}.{did_you_mean(config.image_column, names)}"
        )
    features = dataset.features
    if features is not None and isinstance(features[config.image_column], Image):
        return dataset.cast_column(config.image_column, Image(decode=False))
    return dataset


def _columns(dataset: Any, config: DataConfig) -> tuple[str, str]:
    names = dataset.column_names or list(next(iter(dataset)))
    caption = choose_caption_column(names, config.caption_column, str(config.path))
    return config.image_column, caption
