"""Parquet files with a picture column and a caption column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentdiff.data.captions import choose_caption_column
from latentdiff.data.file_tree import find_files
from latentdiff.data.source import DataConfig, few
from latentdiff.data.table import TableSource, check_captions
from latentdiff.errors import UserError


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
