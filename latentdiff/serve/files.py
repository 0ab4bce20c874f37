"""Images as files that links lead to."""

from __future__ import annotations

import re
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from latentdiff.files import atomic_file

#: Seconds for which an image can be had by its link, unless the server keeps them all.
KEPT = 3600
_NAME = re.compile(r"[\w-]{22}\.(png|jpeg|webp)")


class Files:
    """A folder of images, the names of which cannot be guessed."""

    def __init__(self, folder: Path | None) -> None:
        """Args: folder: where they stay; None: for an hour, in a folder of their own."""
        self._own = None if folder else tempfile.TemporaryDirectory(prefix="latentdiff-")
        self._folder = folder or Path(self._own.name)  # type: ignore[union-attr]

    def keep(self, content: bytes, ending: str) -> str:
        """Write an image. Returns: its name. Raises: OSError."""
        self._drop_old()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = secrets.token_urlsafe(16) + ending
        with atomic_file(self._folder / name) as new:
            new.write_bytes(content)
        return name

    def find(self, name: str) -> Path | None:
        """The file of an image that was kept."""
        self._drop_old()
        file = self._folder / name
        return file if _NAME.fullmatch(name) and file.is_file() else None

    def close(self) -> None:
        if self._own is not None:
            self._own.cleanup()

    def _drop_old(self) -> None:
        for file in self._folder.iterdir() if self._own else ():
            with suppress(OSError):  # another request was faster
                if file.stat().st_mtime < time.time() - KEPT:
                    file.unlink()
