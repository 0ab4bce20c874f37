"""Data sets that are read from beginning to end as they are needed, and never kept.

For what does not fit on the disk: the `datasets` library fetches a few rows ahead. Which picture
comes when is decided by its shuffle buffer, not by the sample index, so such a run is not repeated
bit for bit; noise and captions still follow the sample index.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from latentdiff.data.captions import choose_caption_column, clean_captions
from latentdiff.data.hub import check_links
from latentdiff.data.images import UnreadableImage, open_image, open_with_alpha
from latentdiff.data.latents import Stored, cache_key, digest
from latentdiff.data.online import OnlineEncoder
from latentdiff.data.source import DataConfig, Example, Skipped, few
from latentdiff.errors import UserError, did_you_mean

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
