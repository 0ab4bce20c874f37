"""What a data set looks like to the rest of the code, and how a configuration opens one.

A source is a map from an index to an RGB picture with its captions. Sources never resize and never
touch tensors; `images` and `latents` do that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from PIL import Image

from latentdiff.config import FREE
from latentdiff.data.images import UnreadableImage
from latentdiff.errors import UserError, choice_error, printable

#: Captioned drawings to try things with; in the repository, not in an installed package.
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "twemoji"
#: A picture that is left out, and why.
Skipped = tuple[str, str]


class Example(NamedTuple):
    """One picture (RGB), everything that is said about it, and a name for messages."""

    image: Image.Image
    captions: tuple[str, ...]
    name: str
    mask: Image.Image | None = None
    """What counts in the loss (white) and what does not; None counts all. See data.loss_mask."""


@runtime_checkable
class Source(Protocol):
    """A map-style data set of captioned pictures.

    Optional, looked up by name: `group(i) -> str`, pictures that must stay on one side of the
    train/validation split; `content_key(i) -> str`, a hash that changes with the picture and is
    cheaper than decoding it; `read(i) -> bytes`, its file, as `latentdiff doctor` looks at it;
    `problems: list[(name, reason)]`, entries left out when opening.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Decode one picture. Raises: UnreadableImage: with its name and the reason."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the picture."""
        ...

    def name(self, index: int) -> str:
        """Return a name that a person can find the picture by."""
        ...

    def fingerprint(self) -> str:
        """Return a cheap hash of which pictures there are; captions do not enter it."""
        ...


class Captioned(Protocol):
    """What `split` needs: a source, a latent cache or a latent pack."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of one picture."""
        ...


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures come from and how they become squares, or rectangles of some shapes."""

    removed: ClassVar = {
        "emoji_variants": 12,
        "emoji_flags": True,
        "emoji_concepts": [],
        "emoji_compositions": "train",
    }
    kind: Literal["folder", "parquet", "hub", "webdataset"] = "folder"
    """folder: images with metadata.jsonl/.csv or .txt files (or a .zip of that); parquet: a file or
    folder of files; hub: a `datasets` id or a `save_to_disk` folder; webdataset: .tar shards of
    pictures and captions of the same names."""
    path: str | None = field(default=None, metadata=FREE)
    """Folder, file or data set id; null with kind folder is examples/twemoji of the repository."""
    follow_links: bool = field(default=False, metadata=FREE)
    """Also read what lies outside the data folder: where links in it lead, and where the paths of a
    table do. Otherwise that is left out and reported."""
    image_column: str = "image"
    """Column of the pictures (parquet and hub)."""
    caption_column: str | None = None
    """Column of the captions, text or a list of texts; null looks for text, caption, captions…"""
    split: str = "train"
    """Which split of a hub data set."""
    subset: str | None = None
    """Which configuration of a hub data set, where it has several."""
    revision: str | None = None
    """Which version (branch, tag or commit) of a hub data set."""
    image_size: int = 64
    """Side of the training squares in pixels; a pretrained model's own when it is not given."""
    crop: Literal["center", "random", "pad"] = "center"
    """center or random: cut a square out of the longer side; pad: keep all, fill with background.
    Cached latents are encoded once, so training on them takes center or pad."""
    buckets: bool = False
    """Keep aspect ratios: bring each picture to the nearest of several shapes of about image_size²
    pixels, each batch of one shape, in place of squares (train_latent.py and cache_latents.py)."""
    bucket_step: int = 64
    """Sides of those shapes are multiples of this many pixels; it must suit autoencoder and U-Net
    (64 for Stable Diffusion, 16 for the embedded model)."""
    bucket_max_ratio: float = 2.0
    """Longest of those shapes, long side over short side; at least 1."""
    loss_mask: Literal["none", "alpha", "file"] = "none"
    """Which pixels count in the loss. alpha: a picture's opacity; file: a grey picture beside it
    (cat.mask.png for cat.png; white counts), or the column mask_column of a table."""
    mask_column: str = "mask"
    """Column of the masks (parquet and hub)."""
    streaming: bool = False
    """Read a hub data set (or a local one of the same forms) as it is needed and keep nothing of
    it: for sets larger than the disk. Such a run cannot be repeated bit for bit."""
    shuffle_buffer: int = 1000
    """How many pictures a stream is shuffled among."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour (red, green, blue: 0…255) shown through transparent pixels and used for padding."""
    validation_share: float = 0.05
    """Share of the pictures (or groups of them) held out from training: 0 ≤ share < 1."""
    split_seed: int = 0
    """Another seed holds out other pictures."""
    quarantine: str | None = field(default=None, metadata=FREE)
    """File of pictures to leave out, one {"name": …, "reason": …} a line, as `latentdiff doctor`
    writes it."""

    def validate(self) -> list[str]:
        """List what does not fit together."""
        problems = []
        if not self.path and (self.kind != "folder" or self.path is not None):
            problems.append(f"path is required for kind {self.kind}: the folder, file or id.")
        elif self.path is None and not EXAMPLE.is_dir():
            problems.append(
                f"path is required: {EXAMPLE}, which is taken without it, is not there (it comes "
                "with the repository, not with an installed package). Set data.path=FOLDER."
            )
        if not 8 <= self.image_size <= 2**15:
            problems.append(f"image_size must be 8 … {2**15} pixels; got {self.image_size}.")
        if not 0 <= self.validation_share < 1:
            problems.append(
                f"validation_share must be at least 0 and below 1; got {self.validation_share}."
            )
        if self.buckets and not 8 <= self.bucket_step <= self.image_size:
            problems.append(
                f"bucket_step must lie in 8 … image_size={self.image_size}; got {self.bucket_step}."
            )
        if self.streaming and self.kind != "hub":
            problems.append(f"streaming is for kind hub; got kind {self.kind}.")
        if self.shuffle_buffer < 1:
            problems.append(f"shuffle_buffer must be at least 1; got {self.shuffle_buffer}.")
        if self.streaming and self.quarantine is not None:
            problems.append(
                "quarantine does not reach a stream. Leave the listed files out of the shards, or "
                "set streaming to false."
            )
        if self.bucket_max_ratio < 1:
            problems.append(f"bucket_max_ratio must be at least 1; got {self.bucket_max_ratio}.")
        if not all(0 <= channel <= 255 for channel in self.background):
            problems.append(f"background channels must be 0…255; got {list(self.background)}.")
        return problems


def guess_kind(dataset: str) -> Literal["folder", "parquet", "hub"]:
    """Tell the kind of a data set from what is there; "folder" when nothing is."""
    place = Path(dataset).expanduser()
    if place.suffix == ".parquet":
        return "parquet"
    if not place.exists():
        return "folder"
    if any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "hub"
    only_tables = place.is_dir() and any(place.glob("*.parquet"))
    return "parquet" if only_tables else "folder"


def open_source(config: DataConfig) -> Source:
    """Open what a configuration names, without what data.quarantine lists. Raises: UserError."""
    source = open_whole(config)
    if config.quarantine is None:
        return source
    from latentdiff.data.captions import Unquarantined, read_quarantine

    return Unquarantined(source, read_quarantine(config.quarantine), config.quarantine)


def open_whole(config: DataConfig) -> Source:
    """Open the data set that a configuration names; nothing is decoded yet.

    Raises: UserError: nothing there, no pictures, no captions, or a column that does not exist.
    """
    problems = config.validate()
    if problems:
        raise UserError("\n".join(f"data.{text}" for text in problems))
    if config.streaming:
        raise UserError(
            "data.streaming=true gives pictures in one order only, which train_latent.py alone can "
            "use. Set it to false here."
        )
    if config.kind == "folder":
        from latentdiff.data.folder import FolderSource

        return FolderSource(config)
    if config.kind == "parquet":
        from latentdiff.data.table import open_parquet

        return open_parquet(config)
    if config.kind == "hub":
        from latentdiff.data.table import open_hub

        return open_hub(config)
    if config.kind == "webdataset":
        from latentdiff.data.webdataset import TarSource

        return TarSource(config)
    raise choice_error("data.kind", config.kind, ("folder", "parquet", "hub", "webdataset"))


class Readable:
    """A source whose unreadable pictures are named once and replaced by the next readable one."""

    def __init__(self, source: Source) -> None:
        self.source, self.skipped = source, set[str]()

    def __getitem__(self, index: int) -> Example:
        """Decode one picture. Raises: UserError: none of the data set can be read."""
        for offset in range(len(self.source)):
            try:
                return self.source[(index + offset) % len(self.source)]
            except UnreadableImage as problem:
                if problem.name not in self.skipped:
                    self.skipped.add(problem.name)
                    print(f"left out: {printable(str(problem))}", flush=True)
        raise UserError("no picture of the data set can be read; see the lines above.")


def problems_of(source: object) -> list[Skipped]:
    """Return the entries that a source left out when it was opened."""
    return list(getattr(source, "problems", ()))


def group_of(source: Captioned, index: int) -> str:
    """Return the key that decides the side of the split: the source's group, else the name."""
    group = getattr(source, "group", None)
    return group(index) if callable(group) else source.name(index)


def split(source: Captioned, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Divide a source into training and validation indices.

    Each group is placed by a hash of (seed, group) alone, so that adding or removing pictures moves
    no others. The validation share is therefore met on average, not exactly; a handful of pictures
    may leave validation empty. Training is never left empty.

    Args:    share: expected share of validation groups, 0 ≤ share < 1.
    Returns: (training indices, validation indices), each ascending.
    """
    if not 0 <= share < 1:
        raise UserError(f"validation_share must be at least 0 and below 1; got {share}.")
    train: list[int] = []
    held_out: list[int] = []
    for index in range(len(source)):
        digest = hashlib.blake2b(_bytes(seed, group_of(source, index)), digest_size=8)
        place = int.from_bytes(digest.digest(), "big") / 2**64
        (held_out if place < share else train).append(index)
    return (train, held_out) if train else (held_out, [])


def _bytes(seed: int, group: str) -> bytes:
    return f"{seed}\x1f{group}".encode("utf-8", "backslashreplace")


def report_skipped(skipped: Sequence[Skipped], limit: int = 10) -> str:
    """Say which pictures are left out and why, or "" when none is."""
    if not skipped:
        return ""
    lines = [f"  {printable(name)}: {printable(reason)}" for name, reason in skipped[:limit]]
    if len(skipped) > limit:
        lines.append(f"  … and {len(skipped) - limit} more")
    plural = "picture is" if len(skipped) == 1 else "pictures are"
    return "\n".join([f"{len(skipped)} {plural} left out (no file was changed):", *lines])


def few(skipped: Sequence[Skipped], limit: int = 5) -> str:
    """The first of what is left out, on one line within an error; "" when nothing is."""
    return "; ".join(f"{printable(name)}: {printable(reason)}" for name, reason in skipped[:limit])
