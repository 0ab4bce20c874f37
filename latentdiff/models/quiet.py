"""Keeping foreign loaders' progress bars and reports off the terminal; errors still raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def quiet(package: str) -> Iterator[None]:
    """Silence `transformers` or `diffusers` inside a with block, then restore their settings."""
    logging: Any = import_module(f"{package}.utils.logging")
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
