"""Any data set of the `datasets` library: a hub id, a `save_to_disk` folder, or a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentdiff.data.file_tree import find_files, is_inside
from latentdiff.data.source import DataConfig, few
from latentdiff.data.table import TableSource
from latentdiff.errors import UserError, did_you_mean


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
