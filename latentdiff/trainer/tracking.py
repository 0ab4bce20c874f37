"""What a run writes down: metrics.jsonl always; TensorBoard, W&B if wanted; a progress bar."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from latentdiff.atomic import write_text

METRICS = "metrics.jsonl"
_NO_TENSORBOARD = (
    "note: no curves for TensorBoard, which is not installed: `pip install 'latentdiff[tracking]'` "
    "(or set loop.tensorboard=false). metrics.jsonl has all numbers."
)


class LoopLength(Protocol):
    """What the tracker needs of the loop's configuration."""

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run."""
        ...

    @property
    def tensorboard(self) -> bool:
        """Whether to write event files."""
        ...


class Writer(Protocol):
    """What TensorBoard's SummaryWriter and `wandb_log.WandbWriter` have in common."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Note a number."""
        ...

    def add_image(self, name: str, picture: Tensor, step: int) -> None:
        """Note a picture, uint8 (3, H, W)."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class Tracker:
    """Writes rows of numbers; does nothing on processes other than the main one.

    Args:
        folder: the run's output folder.
        first_step: steps made so far; later rows of an interrupted run are removed.
        config: its max_steps (end of the progress bar) and tensorboard (event files too, if the
            package is installed) are used.
        active: whether this process writes.
        more: other writers, opened only where this process writes.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        config: LoopLength,
        active: bool,
        more: Callable[[], list[Writer]] = list,
    ) -> None:
        self._active, self._has_shown = active, False
        if not active:
            return
        self._path = folder / METRICS
        forget_after(self._path, first_step)
        self._unwritten: list[str] = []
        self._writers = more()
        events = _summary_writer(folder / "tensorboard", first_step) if config.tensorboard else None
        if events is not None:
            self._writers.append(events)
        from tqdm import tqdm

        slow: Any = {} if sys.stderr.isatty() else {"mininterval": 30.0, "maxinterval": 60.0}
        self._bar: Any = tqdm(
            total=config.max_steps, initial=first_step, unit="step", dynamic_ncols=True, **slow
        )
        if config.tensorboard and events is None:
            self.say(_NO_TENSORBOARD)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; each has `step`, the number of optimizer steps made."""
        if not self._active or not rows:
            return
        self._unwritten += [json.dumps(row) + "\n" for row in rows]
        with self.going_on(METRICS):
            _append(self._path, "".join(self._unwritten))
            self._unwritten = []
        with self.going_on("a file of TensorBoard or W&B"):
            for writer in self._writers:
                for row in rows:
                    for name, value in row.items():
                        if name != "step" and value is not None:
                            writer.add_scalar(name, value, row["step"])

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Warn, and let the training go on, where `what` cannot be written: a full disk, say."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            self.say(f"warning: {what} could not be written ({reason}). Training goes on.")

    def progress(self, step: int, shown: Mapping[str, str]) -> None:
        """Move the bar to a step and show some words beside it."""
        if self._active:
            self._bar.set_postfix(shown, refresh=False)
            drawn = self._bar.update(step - self._bar.n)
            if not (drawn or self._has_shown):  # the first is not held back as others may be
                self._bar.refresh()
            self._has_shown = True

    def image(self, name: str, step: int, picture: Tensor) -> None:
        """Show a picture, uint8 (3, H, W), in TensorBoard and W&B."""
        if self._active:
            with self.going_on("a picture for TensorBoard or W&B"):
                for writer in self._writers:
                    writer.add_image(name, picture, step)

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._active:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close the bar and the other writers."""
        if self._active:
            self._bar.close()
            for writer in self._writers:
                writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; lines that a crash has cut are left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [row for line in lines[:-1] if (row := _row(line)) is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _append(path: Path, text: str) -> None:
    """Append text, or nothing of it. Raises: OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def forget_after(path: Path, step: int) -> None:
    """Keep of a metrics.jsonl what was known at the checkpoint of `step`: the validation after it
    is made again. Lines that a crash has cut go too.
    """
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] < step + ("loss" in row)]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if not path.exists() or path.read_bytes() == text.encode():
        return
    write_text(path, text)


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)
