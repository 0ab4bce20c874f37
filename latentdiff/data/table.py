"""A table with a picture column and a caption column, held by the `datasets` library.

From Parquet files, a hub id, a `save_to_disk` folder, or a local folder of that library's forms.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from latentdiff.data.captions import choose_caption_column, clean_captions, decode_text
from latentdiff.data.folder import MAX_TABLE_BYTES, find_files, is_inside, read_file
from latentdiff.data.images import (
    UnreadableImage,
    display_name,
    open_grey,
    open_image,
    open_with_alpha,
)
from latentdiff.data.source import DataConfig, Example, Skipped, few
from latentdiff.errors import UserError, did_you_mean


class TableSource:
    """Rows of a `datasets.Dataset` that have a caption; pictures are decoded here, one at a time.

    Args:
        dataset: memory-mapped table. The picture column holds `Image` features, file bytes,
            {bytes, path} structs or paths; the caption column texts, lists of them or class labels.
        label: what messages call the table.
        root: folder that relative picture paths start from.
        homes: more folders where pictures may lie; elsewhere only with data.follow_links.
    Attributes: problems: (row, reason) of rows without a caption; they are left out.
    Raises: UserError: a column is not there or holds something else; no rows with captions; no
        row with a mask, where masks are asked for.
    """

    def __init__(
        self, dataset: Any, config: DataConfig, label: str, root: Path, homes: tuple[str, ...] = ()
    ) -> None:
        self._root, self._background = root, config.background
        self._homes = None if config.follow_links else (str(root), *homes)
        self._column = _picture_column(dataset, config.image_column, label)
        caption_column = choose_caption_column(dataset.column_names, config.caption_column, label)
        self._loss_mask, self._mask_column = config.loss_mask, config.mask_column
        if config.loss_mask == "file":
            _picture_column(dataset, config.mask_column, label, "mask_column")
            if dataset.data.column(config.mask_column).null_count == len(dataset):
                raise UserError(
                    f"data.loss_mask=file: no row of {label} has a mask in '{config.mask_column}'."
                )
        columns = [self._column] + [config.mask_column] * (config.loss_mask == "file")
        self._pictures = _without_decoding(dataset, columns)
        self.problems: list[Skipped] = []
        self._rows: list[int] = []
        self._captions: list[tuple[str, ...]] = []
        for row, cell in enumerate(_caption_cells(dataset, caption_column, label)):
            try:
                captions, reason = clean_captions(_decoded(cell)), "no caption"
            except ValueError as error:
                captions, reason = (), f"its caption cannot be read ({error})"
            if captions:
                self._rows.append(row)
                self._captions.append(captions)
            else:
                self.problems.append((f"row {row}", reason))
        if not self._rows:
            raise UserError(
                f"{label}: 0 usable images, none of {len(dataset)} rows has text in the column "
                f"'{caption_column}'. Choose another: data.caption_column=NAME (columns: "
                f"{', '.join(dataset.column_names)})."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        name, data, captions = self.name(index), self.read(index), self.captions(index)
        if self._loss_mask == "alpha":
            image, alpha = open_with_alpha(data, name, self._background)
            return Example(image, captions, name, alpha)
        image, mask = open_image(data, name, self._background), self._mask(index)
        return Example(image, captions, name, open_grey(mask, name) if mask else None)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one row."""
        return self._captions[index]

    def name(self, index: int) -> str:
        """Return the row's number in the table."""
        return f"row {self._rows[index]}"

    def content_key(self, index: int) -> str:
        """Hash the file's bytes and the background. Raises: UnreadableImage."""
        digest = hashlib.blake2b(self._bytes(index), digest_size=16)
        digest.update(bytes(self._background))
        digest.update(self._mask(index) or b"")
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Hash the table's own fingerprint and which rows are used."""
        words = (self._pictures._fingerprint, self._column, self._background, self._rows)
        return hashlib.blake2b(repr(words).encode(), digest_size=16).hexdigest()

    def _mask(self, index: int) -> bytes | None:
        """The mask's file; None where there is none, and everything counts."""
        if self._loss_mask != "file":
            return None
        if self._pictures[self._rows[index]][self._mask_column] is None:
            return None
        return self._bytes(index, self._mask_column)

    def read(self, index: int) -> bytes:
        """Return the bytes of one row's picture file. Raises: UnreadableImage."""
        return self._bytes(index)

    def _bytes(self, index: int, column: str | None = None) -> bytes:
        name, cell = self.name(index), self._pictures[self._rows[index]][column or self._column]
        data, path = (
            (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        )
        if isinstance(data, str):
            data, path = None, data
        if data is not None:
            return bytes(data)
        if not path:
            raise UnreadableImage(name, "the row has no picture")
        try:
            if self._homes is not None and not is_inside(self._root / path, *self._homes):
                raise OSError(
                    "it lies outside the data folder; data.follow_links=true reads it all the same"
                )
            return read_file(self._root / path)
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise UnreadableImage(
                f"{name} ({display_name(path)})", f"cannot be read ({error})"
            ) from error


def _picture_column(dataset: Any, wanted: str, label: str, key: str = "image_column") -> str:
    """Check that a column holds pictures."""
    from datasets import Image

    features = dataset.features
    likely = [name for name, feature in features.items() if isinstance(feature, Image)]
    if wanted not in features:
        hint = did_you_mean(wanted, features) or (
            f" Pictures are in: {', '.join(likely)}." * bool(likely)
        )
        raise UserError(
            f"data.{key}: {label} has no column '{wanted}'; its columns are "
            f"{', '.join(features)}.{hint}"
        )
    feature = features[wanted]
    is_struct = isinstance(feature, dict) and {"bytes", "path"} & set(feature)
    is_plain = getattr(feature, "dtype", None) in (
        "binary",
        "large_binary",
        "string",
        "large_string",
    )
    if not (isinstance(feature, Image) or is_struct or is_plain):
        hint = f" Try: {', '.join(likely)}." if likely else ""
        raise UserError(
            f"data.{key}: the column '{wanted}' of {label} holds {feature}, not pictures "
            f"(file bytes, {{bytes, path}} or a path).{hint}"
        )
    return wanted


def _without_decoding(dataset: Any, columns: list[str]) -> Any:
    from datasets import Image

    pictures = dataset.with_format(None).select_columns(columns)
    for column in columns:
        if isinstance(dataset.features[column], Image):
            pictures = pictures.cast_column(column, Image(decode=False))
    return pictures


def _caption_cells(dataset: Any, column: str, label: str) -> list[Any]:
    """Texts, lists of them or None; bytes in place of texts if some of them are not UTF-8."""
    import pyarrow as pa
    from datasets import ClassLabel

    texts = dataset.with_format(None).select_columns([column])
    check_captions(texts.data.nbytes, column, label)
    feature = dataset.features[column]
    try:
        cells = texts[:][column]
    except UnicodeDecodeError:
        stored = texts.with_format("arrow")[:].column(column)
        nested = pa.types.is_list(stored.type) or pa.types.is_large_list(stored.type)
        return stored.cast(pa.list_(pa.binary()) if nested else pa.binary()).to_pylist()
    if isinstance(feature, ClassLabel):
        names = [name.replace("_", " ") for name in feature.names]
        cells = [None if cell is None or cell < 0 else names[cell] for cell in cells]
    return list(cells)


def _decoded(cell: Any) -> Any:
    """Texts for bytes. Raises: ValueError: they are not UTF-8."""
    if isinstance(cell, list):
        return [_decoded(part) for part in cell]
    return decode_text(cell) if isinstance(cell, bytes) else cell


def check_captions(size: int, column: str, label: str) -> None:
    """Refuse captions that would not fit in memory. Raises: UserError."""
    if size > MAX_TABLE_BYTES:
        raise UserError(
            f"the column '{column}' of {label} holds {size / 2**20:.0f} MB, more than the "
            f"{MAX_TABLE_BYTES / 2**20:.0f} MB allowed. Name another: data.caption_column=NAME, or "
            "read the set as tar shards (data.kind=webdataset)."
        )


def open_parquet(config: DataConfig) -> TableSource:
    """Open one .parquet file or all below a folder, in the order of their names.

    `datasets` converts them once to memory-mapped Arrow in its own cache; rows are read as needed.
    Raises: UserError: nothing there, unreadable files, differing columns, or see TableSource.
    """
    place = Path(config.path or "").expanduser()
    if not place.exists():
        raise UserError(
            f"data.path: {config.path} does not exist. Give a .parquet file or a folder."
        )
    folder = place.is_dir()
    found = find_files(place, ("*.parquet",), config.follow_links) if folder else ([place], [])
    files, problems = found
    if not files:
        left_out = f" Left out: {few(problems)}." * bool(problems)
        raise UserError(f"data.path: no .parquet files in {place} or below it.{left_out}")
    from datasets import Dataset

    try:
        _check_sizes(files, config, str(place))
        dataset = Dataset.from_parquet([str(file) for file in files])
    except UserError:
        raise
    except Exception as error:  # the library wraps what went wrong in many ways
        cause = error.__cause__ or error
        raise UserError(
            f"the parquet data in {place} cannot be read ({cause}). All files must be complete and "
            "have the same columns."
        ) from error
    source = TableSource(dataset, config, str(place), place if folder else place.parent)
    source.problems += problems
    return source


def _check_sizes(files: list[Path], config: DataConfig, label: str) -> None:
    """Refuse captions that are too large once each repeat, which is stored once, is written out."""
    from pyarrow.parquet import ParquetFile

    total = 0
    for file in files:
        plain = ParquetFile(file)
        column = choose_caption_column(plain.schema_arrow.names, config.caption_column, label)
        leaves = [plain.schema.column(i) for i in range(len(plain.schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        for batch in ParquetFile(file, read_dictionary=texts).iter_batches(columns=[column]):
            total += _size(batch.column(0))
            check_captions(total, column, label)


def _size(texts: Any) -> int:
    """Bytes of an array of texts or lists of them, repeats written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_nested(texts.type) and hasattr(texts, "value_lengths"):
        texts = texts.flatten()
    if not pa.types.is_dictionary(texts.type):
        return int(texts.nbytes)
    return pc.sum(pc.take(pc.binary_length(texts.dictionary), texts.indices)).as_py() or 0


def open_hub(config: DataConfig) -> TableSource:
    """Open a data set by id or folder; a folder never touches the network.

    Raises: UserError: cannot be found or loaded, no such split or subset, or see TableSource.
    """
    path = config.path or ""
    place = Path(path).expanduser()
    if not place.exists() and path.startswith((".", "/", "~")):
        raise UserError(f"data.path: the folder {path} does not exist.")
    try:
        check_links(place, config)
        loaded = _load(place, config) if place.exists() else _download(config)
    except UserError:
        raise
    except Exception as error:  # network, permissions, missing repository, broken files …
        where = (
            "in the folder" if place.exists() else "on the Hugging Face hub (no such folder here)"
        )
        raise UserError(
            f"the data set {path} cannot be loaded {where}: {type(error).__name__}: {error}"
        ) from error
    return TableSource(_choose_split(loaded, config, path), config, path, place, _caches())


def _load(place: Path, config: DataConfig) -> Any:
    import datasets
    from datasets import load_dataset, load_from_disk

    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return load_from_disk(str(place))
    # Even for a local folder the library reports its use over the network.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return load_dataset(str(place), name=config.subset)


def _download(config: DataConfig) -> Any:
    from datasets import load_dataset

    return load_dataset(config.path or "", name=config.subset, revision=config.revision)


def check_links(place: Path, config: DataConfig) -> None:
    """Refuse a local folder with links that leave it: the library would follow them.

    Raises: UserError: naming them.
    """
    if config.follow_links or not place.is_dir() or is_inside(place, *_caches()):
        return
    problems = find_files(place, ("*",), follow_links=False)[1]
    if problems:
        raise UserError(f"data.path: {place} cannot be opened: {few(problems)}.")


def _caches() -> tuple[str, ...]:
    """Where the libraries put what they download or unpack."""
    import datasets
    import huggingface_hub

    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    return (*map(str, caches), huggingface_hub.constants.HF_HUB_CACHE)


def _choose_split(loaded: Any, config: DataConfig, path: str) -> Any:
    from datasets import DatasetDict

    if not isinstance(loaded, DatasetDict):
        return loaded
    if config.split not in loaded:
        raise UserError(
            f"data.split: {path} has no split '{config.split}'; it has {', '.join(loaded)}."
            f"{did_you_mean(config.split, loaded)}"
        )
    return loaded[config.split]
