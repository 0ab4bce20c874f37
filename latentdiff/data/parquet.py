"""Parquet files with a picture column and a caption column."""

from __future__ import annotations

from pathlib import Path

from latentdiff.data.source import DataConfig
from latentdiff.data.table import TableSource
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
    files = [place] if place.is_file() else sorted(place.rglob("*.parquet"))
    if not files:
        raise UserError(f"data.path: no .parquet files in {place} or below it.")
    from datasets import Dataset

    try:
        dataset = Dataset.from_parquet([str(file) for file in files])
    except Exception as error:  # the library wraps what went wrong in many ways
        cause = error.__cause__ or error
        raise UserError(
            f"the parquet data in {place} cannot be read ({cause}). All files must be complete and "
            "have the same columns."
        ) from error
    return TableSource(dataset, config, str(place), place if place.is_dir() else place.parent)
