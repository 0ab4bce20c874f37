"""A table with an image column and a caption column, held by the `datasets` library.

From Parquet files, a hub id, a `save_to_disk` folder, or a local folder of that library's forms;
whole, as a source, or as a stream of rows. The library stores, maps and downloads; what a cell
holds is read and decoded here, so that errors, limits and links are as in a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from latentdiff.data.captions import choose_caption_column, decode_text
from latentdiff.data.file_tree import MAX_TABLE_BYTES, find_files, is_inside, read_file
from latentdiff.data.images import UnreadableImage, display_name
from latentdiff.data.source import DataConfig, FileSource, few, left_out
from latentdiff.errors import UserError, did_you_mean


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
        raise UserError(f"data.path: no .parquet files in {place} or below it.{left_out(problems)}")
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


def open_hub(config: DataConfig) -> TableSource:
    """Open a data set by id or folder; a folder never touches the network.

    Raises: UserError: cannot be found or loaded, no such split or subset, or see TableSource.
    """
    path = config.path or ""
    return TableSource(_load(config), config, path, Path(path).expanduser(), _caches())


def open_stream(config: DataConfig) -> tuple[Any, str]:
    """Open a data set as rows in one order, images as they are in their files.

    Returns: iterable of rows with the column data.image_column, and its caption column.
    Raises:  UserError: as `open_hub`.
    """
    label, dataset = str(config.path), _load(config, streaming=True)
    # Some formats only say which columns they have when they are read.
    names = dataset.column_names or list(next(iter(dataset)))
    _check_column(names, dataset.features, config.image_column, label)
    caption_column = choose_caption_column(names, config.caption_column, label)
    return _undecoded(dataset, [config.image_column]), caption_column


class TableSource(FileSource):
    """Rows of a `datasets.Dataset` that have a caption; images are decoded here, one at a time.

    Args:
        dataset: memory-mapped table. The image column holds `Image` features, file bytes,
            {bytes, path} structs or paths; the caption column texts, lists of them or class labels.
        label: what messages call the table.
        root: folder that relative image paths start from.
        homes: more folders where images may lie; elsewhere only with data.follow_links.
    Raises: UserError: a column is not there or holds something else; no rows with captions; no
        row with a mask, where masks are asked for.
    """

    def __init__(
        self, dataset: Any, config: DataConfig, label: str, root: Path, homes: Sequence[str] = ()
    ) -> None:
        super().__init__(config)
        self._root = root
        self._homes = None if config.follow_links else (str(root), *homes)
        names, features, columns = dataset.column_names, dataset.features, [config.image_column]
        _check_column(names, features, config.image_column, label)
        caption_column = choose_caption_column(names, config.caption_column, label)
        if config.mask_files:
            columns.append(config.mask_column)
            _check_column(names, features, config.mask_column, label, "mask_column")
            if dataset.data.column(config.mask_column).null_count == len(dataset):
                raise UserError(
                    f"{config.mask_files}: no row of {label} has a mask in '{config.mask_column}'."
                )
        self._images = _undecoded(dataset.with_format(None).select_columns(columns), columns)
        self._rows: list[int] = []
        self._captions: list[tuple[str, ...]] = []
        for row, cell in enumerate(_caption_cells(dataset, caption_column, label)):
            if captions := self.captions_or_skip(f"row {row}", partial(_decoded, cell)):
                self._rows.append(row)
                self._captions.append(captions)
        if not self._rows:
            raise UserError(
                f"{label}: 0 usable images, none of {len(dataset)} rows has text in the column "
                f"'{caption_column}'. Choose another: data.caption_column=NAME (columns: "
                f"{', '.join(names)})."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one row."""
        return self._captions[index]

    def name(self, index: int) -> str:
        """Return the row's number in the table."""
        return f"row {self._rows[index]}"

    def fingerprint(self) -> str:
        """Hash the table's own fingerprint and which rows are used."""
        config = self.config
        words = (self._images._fingerprint, config.image_column, config.background, self._rows)
        return hashlib.blake2b(repr(words).encode(), digest_size=16).hexdigest()

    def read(self, index: int) -> bytes:
        """Return the bytes of one row's image file. Raises: UnreadableImage."""
        return self._bytes(index, self._images[self._rows[index]][self.config.image_column])

    def read_mask(self, index: int) -> bytes | None:
        """Return those of the row's mask. Raises: UnreadableImage."""
        if not self.config.mask_files:
            return None
        cell = self._images[self._rows[index]][self.config.mask_column]
        return None if cell is None else self._bytes(index, cell)

    def _bytes(self, index: int, cell: Any) -> bytes:
        data, path = bytes_and_path(cell)
        if data is not None:
            return data
        if not path:
            raise UnreadableImage(self.name(index), "the row has no image")
        try:
            if self._homes is not None and not is_inside(self._root / path, *self._homes):
                raise OSError(
                    "it lies outside the data folder; data.follow_links=true reads it all the same"
                )
            return read_file(self._root / path)
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise UnreadableImage(
                f"{self.name(index)} ({display_name(path)})", f"cannot be read ({error})"
            ) from error


def bytes_and_path(cell: Any) -> tuple[bytes | None, str | None]:
    """What a cell of an image column holds: the file, or where it is."""
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
    else:
        data, path = cell, None
    return (None, data) if isinstance(data, str) else (data and bytes(data), path)


def _check_column(
    names: Sequence[str], features: Any, wanted: str, label: str, key: str = "image_column"
) -> None:
    """Check that a column holds images, as far as it says what it holds. Raises: UserError."""
    from datasets import Image

    likely = [name for name, feature in (features or {}).items() if isinstance(feature, Image)]
    if wanted not in names:
        hint = did_you_mean(wanted, names) or (
            f" Images are in: {', '.join(likely)}." * bool(likely)
        )
        raise UserError(
            f"data.{key}: {label} has no column '{wanted}'; its columns are "
            f"{', '.join(names)}.{hint}"
        )
    if features is None:
        return
    feature = features[wanted]
    is_struct = isinstance(feature, dict) and {"bytes", "path"} & set(feature)
    plain = ("binary", "large_binary", "string", "large_string")
    if not (isinstance(feature, Image) or is_struct or getattr(feature, "dtype", None) in plain):
        hint = f" Try: {', '.join(likely)}." * bool(likely)
        raise UserError(
            f"data.{key}: the column '{wanted}' of {label} holds {feature}, not images "
            f"(file bytes, {{bytes, path}} or a path).{hint}"
        )


def _undecoded(dataset: Any, columns: Sequence[str]) -> Any:
    """Leave images as file bytes, which our own decoder takes."""
    from datasets import Image

    for column in columns:
        if isinstance((dataset.features or {}).get(column), Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def _caption_cells(dataset: Any, column: str, label: str) -> list[Any]:
    """Texts, lists of them or None; bytes in place of texts if some of them are not UTF-8."""
    import pyarrow as pa
    from datasets import ClassLabel

    texts = dataset.with_format(None).select_columns([column])
    _check_size(texts.data.nbytes, column, label)
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
            _check_size(total, column, label)


def _size(texts: Any) -> int:
    """Bytes of an array of texts or lists of them, repeats written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_nested(texts.type) and hasattr(texts, "value_lengths"):
        texts = texts.flatten()
    if not pa.types.is_dictionary(texts.type):
        return int(texts.nbytes)
    return pc.sum(pc.take(pc.binary_length(texts.dictionary), texts.indices)).as_py() or 0


def _check_size(size: int, column: str, label: str) -> None:
    """Refuse captions that would not fit in memory. Raises: UserError."""
    if size > MAX_TABLE_BYTES:
        raise UserError(
            f"the column '{column}' of {label} holds {size / 2**20:.0f} MB, more than the "
            f"{MAX_TABLE_BYTES / 2**20:.0f} MB allowed. Name another: data.caption_column=NAME, or "
            "read the set as tar shards (data.kind=webdataset)."
        )


def _load(config: DataConfig, streaming: bool = False) -> Any:
    """Load one split by id or folder; a local path never touches the network. Raises: UserError."""
    import datasets

    path = config.path or ""
    place = Path(path).expanduser()
    local = place.exists()
    if not local and path.startswith((".", "/", "~")):
        raise UserError(f"data.path: the folder {path} does not exist.")
    _check_links(place, config)
    saved = any((place / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved and not streaming:
            loaded = datasets.load_from_disk(str(place))
        elif local:
            # Even for a local folder the library reports its use over the network.
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
            loaded = datasets.load_dataset(str(place), name=config.subset, streaming=streaming)
        else:
            loaded = datasets.load_dataset(
                path, name=config.subset, revision=config.revision, streaming=streaming
            )
    except Exception as error:  # network, permissions, missing repository, broken files …
        done = "streamed" if streaming else "loaded"
        where = "in the folder" if local else "on the Hugging Face hub (no such folder here)"
        raise UserError(
            f"the data set {path} cannot be {done} {where}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(loaded, dict):
        return loaded
    if config.split not in loaded:
        raise UserError(
            f"data.split: {path} has no split '{config.split}'; it has {', '.join(loaded)}."
            f"{did_you_mean(config.split, loaded)}"
        )
    return loaded[config.split]


def _check_links(place: Path, config: DataConfig) -> None:
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
