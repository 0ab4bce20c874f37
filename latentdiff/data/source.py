"""What a data set looks like to the rest of the code, and how a configuration opens one.

A source is a map from an index to an RGB image with its captions. Sources never resize and never
touch tensors; `images` and `latents` do that. A new kind of source is a `FileSource` in a file of
its own, a word in `DataConfig.kind` and two lines in `open_whole`; a new form of captions within a
folder is a name in `folder.METADATA_NAMES` and a branch in `captions.read_table`.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image

from latentdiff.config import FREE
from latentdiff.data.captions import clean_captions
from latentdiff.data.images import UnreadableImage, open_grey, open_image, open_with_alpha
from latentdiff.errors import UserError, choice_error, ctrl_c_held, printable

T = TypeVar("T")
#: Captioned drawings to try things with; in the repository, not in an installed package.
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "twemoji"
#: An image that is left out, and why.
Skipped = tuple[str, str]


class Example(NamedTuple):
    """One image (RGB), all its captions, and a name for messages."""

    image: Image.Image
    captions: tuple[str, ...]
    name: str
    mask: Image.Image | None = None
    """White is what counts in the loss, or what is to be painted; None: all counts, nothing is said
    of painting. See data.loss_mask and data.inpaint_mask."""


@runtime_checkable
class Source(Protocol):
    """A map-style data set of captioned images.

    Optional, looked up by name: `content_key(i) -> str`, a hash that changes with the image and is
    cheaper than decoding it; `problems: list[(name, reason)]`, entries left out when opening.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Decode one image. Raises: UnreadableImage: with its name and the reason."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image."""
        ...

    def name(self, index: int) -> str:
        """Return a name that a person can find the image by."""
        ...

    def fingerprint(self) -> str:
        """Return a cheap hash of which images there are; captions do not enter it."""
        ...


class Captioned(Protocol):
    """What `split` needs: a source, a latent cache or a latent pack."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of one image."""
        ...


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they become squares, or rectangles of some shapes."""

    removed: ClassVar = {
        "emoji_variants": 12,
        "emoji_flags": True,
        "emoji_concepts": [],
        "emoji_compositions": "train",
    }
    kind: Literal["folder", "parquet", "hub", "webdataset"] = "folder"
    """folder: images with metadata.jsonl/.csv or .txt files (or a .zip of that); parquet: a file or
    folder of files; hub: a `datasets` id or a `save_to_disk` folder; webdataset: .tar shards of
    images and captions of the same names."""
    path: str | None = field(default=None, metadata=FREE)
    """Folder, file or data set id; null with kind folder is examples/twemoji of the repository."""
    follow_links: bool = field(default=False, metadata=FREE)
    """Also read what lies outside the data folder: where links in it lead, and where the paths of a
    table do. Otherwise that is left out and reported."""
    image_column: str = "image"
    """Column of the images (parquet and hub)."""
    caption_column: str | None = None
    """Column of the captions, text or a list of texts; null looks for text, caption, captions…"""
    caption_from: Literal["auto", "filename"] = "auto"
    """auto: a folder's metadata file, or the texts beside its images; filename: an image's name
    without its ending, with spaces for underscores (kind folder)."""
    caption_lines: Literal["each", "joined"] = "each"
    """Text files beside images: each line is a caption, or all lines joined are one."""
    repeat_folders: bool = False
    """Folders named like 10_a dog, as for kohya's scripts: train_latent.py takes each image of it
    10 times an epoch, and "a dog" is the caption of those that have no other (kind folder)."""
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
    """Keep aspect ratios: bring each image to the nearest of several shapes of about image_size²
    pixels, each batch of one shape, in place of squares (train_latent.py and cache_latents.py)."""
    bucket_step: int = 64
    """Sides of those shapes are multiples of this many pixels; it must suit autoencoder and U-Net
    (64 for Stable Diffusion, 16 for the embedded model)."""
    bucket_max_ratio: float = 2.0
    """Longest of those shapes, long side over short side; at least 1."""
    no_upscale: bool = False
    """Add smaller shapes, so that no image is enlarged to fit into its bucket."""
    loss_mask: Literal["none", "alpha", "file"] = "none"
    """Which pixels count in the loss. alpha: an image's opacity; file: a grey image beside it
    (cat.mask.png for cat.png; white counts), or the column mask_column of a table."""
    inpaint_mask: bool = False
    """The same files and column say what an inpainting model has to paint (white), in half of the
    samples with a random mask otherwise; all pixels count in the loss."""
    mask_column: str = "mask"
    """Column of the masks (parquet and hub)."""
    streaming: bool = False
    """Read a hub data set (or a local one of the same forms) as it is needed and keep nothing of
    it: for sets larger than the disk. Such a run cannot be repeated bit for bit."""
    shuffle_buffer: int = 1000
    """How many images a stream is shuffled among."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour (red, green, blue: 0…255) shown through transparent pixels and used for padding."""
    validation_share: float = 0.05
    """Share of the images (or groups of them) held out from training: 0 ≤ share < 1."""
    split_seed: int = 0
    """Another seed holds out other images."""
    quarantine: str | None = field(default=None, metadata=FREE)
    """File of images to leave out, one {"name": …, "reason": …} a line, as `latentdiff doctor`
    writes it."""

    @property
    def mask_files(self) -> str | None:
        """The option that asks for mask files, for messages; None: there is none."""
        if self.inpaint_mask:
            return "data.inpaint_mask=true"
        return "data.loss_mask=file" if self.loss_mask == "file" else None

    def validate(self) -> list[str]:
        """List what does not fit together."""
        problems = []
        if self.inpaint_mask and self.loss_mask != "none":
            problems.append(
                f"inpaint_mask is true and loss_mask is {self.loss_mask}: an image has one mask, "
                "which says what is painted or what counts in the loss. Leave one of them out."
            )
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
        if self.no_upscale and not self.buckets:
            problems.append("no_upscale adds smaller buckets: set buckets to true as well.")
        if self.kind != "folder" and (self.caption_from != "auto" or self.repeat_folders):
            problems.append(
                f"caption_from and repeat_folders are for kind folder; got kind {self.kind}."
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


def decode(
    data: bytes,
    captions: tuple[str, ...],
    name: str,
    config: DataConfig,
    mask: bytes | None = None,
) -> Example:
    """Decode an image's file, and its mask's where there is one. Raises: UnreadableImage."""
    if config.loss_mask == "alpha":
        image, alpha = open_with_alpha(data, name, config.background)
        return Example(image, captions, name, alpha)
    image = open_image(data, name, config.background)
    if mask is None:
        return Example(image, captions, name)
    try:
        return Example(image, captions, name, open_grey(mask, name))
    except UnreadableImage as error:
        raise UnreadableImage(name, f"its mask: {error.reason}") from error


class FileSource(Source):
    """A source whose images are files, wherever they lie: folder, archive, shard or table.

    Attributes: problems: (name, reason) of the entries that were left out when it was opened.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.problems: list[Skipped] = []

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the bytes of one image's file. Raises: UnreadableImage."""

    @abstractmethod
    def read_mask(self, index: int) -> bytes | None:
        """Return those of its mask; None where there is none. Raises: UnreadableImage."""

    def __getitem__(self, index: int) -> Example:
        """Decode one image. Raises: UnreadableImage."""
        return self.decoded(index, self.read(index))

    def decoded(self, index: int, data: bytes) -> Example:
        """Decode what `read` has returned. Raises: UnreadableImage."""
        captions, name = self.captions(index), self.name(index)
        return decode(data, captions, name, self.config, self.read_mask(index))

    def captions_or_skip(self, name: str, read: Callable[[], object]) -> tuple[str, ...]:
        """Read and clean an image's captions; where there are none, list it as left out.

        Args:    read: gives a text or a list of texts; what it raises is the reason.
        """
        reason = "no caption"
        try:
            if captions := clean_captions(read()):
                return captions
        except (OSError, ValueError, RecursionError) as error:
            reason = f"its caption cannot be read ({error})"
        self.problems.append((name, reason))
        return ()

    def content_key(self, index: int) -> str:
        """Hash the files' bytes and the background. Raises: UnreadableImage."""
        digest = hashlib.blake2b(self.read(index), digest_size=16)
        digest.update(bytes(self.config.background))
        digest.update(self.read_mask(index) or b"")
        return digest.hexdigest()


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
    from latentdiff.data.quarantine import Unquarantined, read_quarantine

    return Unquarantined(source, read_quarantine(config.quarantine), config.quarantine)


def open_whole(config: DataConfig) -> Source:
    """Open the data set that a configuration names; nothing is decoded yet.

    Raises: UserError: nothing there, no images, no captions, or a column that does not exist.
    """
    problems = config.validate()
    if problems:
        raise UserError("\n".join(f"data.{text}" for text in problems))
    if config.streaming:
        raise UserError(
            "data.streaming=true gives images in one order only, which train_latent.py alone can "
            "use. Set it to false here."
        )
    if config.kind == "folder":
        from latentdiff.data.folder import FolderSource

        return FolderSource(config)
    if config.kind == "webdataset":
        from latentdiff.data.webdataset import TarSource

        return TarSource(config)
    from latentdiff.data.table import open_hub, open_parquet

    openers = {"parquet": open_parquet, "hub": open_hub}
    if config.kind not in openers:
        raise choice_error("data.kind", config.kind, ("folder", "webdataset", *openers))
    return openers[config.kind](config)


class View:
    """Some images of a source, with the captions and names that they have there.

    Attributes: source_indices: which image of the source each is.
    """

    def __init__(
        self, source: Source, source_indices: Sequence[int] | np.ndarray[Any, Any]
    ) -> None:
        self.source, self.source_indices = source, source_indices

    def __len__(self) -> int:
        return len(self.source_indices)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one image."""
        return self.source.captions(int(self.source_indices[index]))

    def name(self, index: int) -> str:
        """Return the name of one image."""
        return self.source.name(int(self.source_indices[index]))


class Readable:
    """A source whose unreadable images are named once and replaced by the next readable one."""

    def __init__(self, source: Source) -> None:
        self.source, self.skipped = source, set[str]()

    def __getitem__(self, index: int) -> Example:
        """Decode one image. Raises: UserError: none of the data set can be read."""
        for offset in range(len(self.source)):
            try:
                return self.source[(index + offset) % len(self.source)]
            except UnreadableImage as problem:
                if problem.name not in self.skipped:
                    self.skipped.add(problem.name)
                    print(f"left out: {printable(str(problem))}", flush=True)
        raise UserError("no image of the data set can be read; see the lines above.")


def problems_of(source: object) -> list[Skipped]:
    """Return the entries that a source left out when it was opened."""
    return list(getattr(source, "problems", ()))


def split(source: Captioned, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Divide a source into training and validation indices.

    Each image is placed by a hash of (seed, name) alone, so that adding or removing images moves
    no others. The validation share is therefore met on average, not exactly; a handful of images
    may leave validation empty. Training is never left empty.

    Args:    share: expected share of validation images, 0 ≤ share < 1.
    Returns: (training indices, validation indices), each ascending.
    """
    if not 0 <= share < 1:
        raise UserError(f"validation_share must be at least 0 and below 1; got {share}.")
    train: list[int] = []
    held_out: list[int] = []
    for index in range(len(source)):
        found = hashlib.blake2b(_encoded(f"{seed}\x1f{source.name(index)}"), digest_size=8)
        place = int.from_bytes(found.digest(), "big") / 2**64
        (held_out if place < share else train).append(index)
    return (train, held_out) if train else (held_out, [])


def digest(*parts: str | bytes) -> str:
    """32 hexadecimal digits that differ when any part does."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(_encoded(part) if isinstance(part, str) else part)
        found.update(b"\x1f")
    return found.hexdigest()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def map_ahead(
    call: Callable[[int], T], items: Iterable[int], threads: int, ahead: int
) -> Iterator[T]:
    """Yield call(item) in order while threads work on at most `ahead` items."""
    waiting: deque[Future[T]] = deque()

    def first() -> T:
        with ctrl_c_held():
            return waiting.popleft().result()

    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                with ctrl_c_held():
                    waiting.append(pool.submit(call, item))
                if len(waiting) >= ahead:
                    yield first()
            while waiting:
                yield first()
        finally:
            with ctrl_c_held():
                for future in waiting:  # after Ctrl-C what is still in the queue is not waited for
                    future.cancel()


def report_skipped(skipped: Sequence[Skipped], limit: int = 10) -> str:
    """Say which images are left out and why, or "" when none is."""
    if not skipped:
        return ""
    lines = [f"  {printable(name)}: {printable(reason)}" for name, reason in skipped[:limit]]
    if len(skipped) > limit:
        lines.append(f"  … and {len(skipped) - limit} more")
    plural = "image is" if len(skipped) == 1 else "images are"
    return "\n".join([f"{len(skipped)} {plural} left out (no file was changed):", *lines])


def few(skipped: Sequence[Skipped], limit: int = 5) -> str:
    """The first of what is left out, on one line within an error; "" when nothing is."""
    return "; ".join(f"{printable(name)}: {printable(reason)}" for name, reason in skipped[:limit])


def left_out(skipped: Sequence[Skipped]) -> str:
    """ " Left out: …." for the end of an error; "" when nothing is."""
    return f" Left out: {few(skipped)}." * bool(skipped)
