"""Images as files: for links to them, and for good where the server was told so."""

from __future__ import annotations

import re
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from latentdiff.errors import UserError, warn
from latentdiff.images import check_place
from latentdiff.pipelines.metadata import write
from latentdiff.serve.engine import Made

#: Seconds for which an image can be had by its link.
KEPT = 3600
#: Bytes of all of them, beyond which the oldest leave before that.
MOST = 2**30
_NAME = re.compile(r"[\w-]{22}\.(png|jpeg|webp)")


class Links:
    """Images under names that cannot be guessed, for an hour."""

    def __init__(self, folder: Path | None) -> None:
        """Args: folder: that of all replicas; None: one of its own."""
        self._own = None if folder else tempfile.TemporaryDirectory(prefix="latentdiff-")
        self._folder = folder or Path(self._own.name)  # type: ignore[union-attr]

    def keep(self, content: bytes, ending: str) -> str:
        """Write an image. Returns: its name."""
        self._drop_old()
        # Services that clean up temporary folders may have removed it since.
        self._folder.mkdir(0o700, parents=True, exist_ok=True)
        name = secrets.token_urlsafe(16) + ending
        (self._folder / name).write_bytes(content)
        return name

    def find(self, name: str) -> Path | None:
        """The file of an image, as long as there is one."""
        self._drop_old()
        file = self._folder / name
        return file if _NAME.fullmatch(name) and file.is_file() else None

    def close(self) -> None:
        if self._own is not None:
            self._own.cleanup()

    def _drop_old(self) -> None:
        found, kept = list[tuple[float, int, Path]](), 0
        with suppress(OSError):  # there is no folder
            for file in self._folder.iterdir():
                with suppress(OSError):  # another request was faster
                    about = file.stat()
                    if _NAME.fullmatch(file.name):
                        found.append((about.st_mtime, about.st_size, file))
        for written, size, file in sorted(found, reverse=True):
            kept += size
            if written < time.time() - KEPT or kept > MOST:
                with suppress(OSError):
                    file.unlink()


class Output:
    """A folder in which all images are kept, with how they were made.

    Raises:  UserError: nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        check_place(folder / "image.png", "--output")

    def keep(self, made: Made) -> None:
        """Write an image, or warn; it is sent all the same."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{made.settings['seed']}-{secrets.token_hex(2)}.png"
        try:
            write(made.image, self._folder / name, made.settings)
        except UserError as error:
            warn(str(error))
