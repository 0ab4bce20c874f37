"""What a run writes down: metrics.jsonl always; TensorBoard, W&B if wanted; a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from latentdiff.atomic import write_text

METRICS = "metrics.jsonl"


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
        self._writers = more()
        if config.tensorboard and (events := _summary_writer(folder / "tensorboard", first_step)):
            self._writers.append(events)
        from tqdm import tqdm

        slow: Any = {} if sys.stderr.isatty() else {"mininterval": 30.0, "maxinterval": 60.0}
        self._bar: Any = tqdm(
            total=config.max_steps, initial=first_step, unit="step", dynamic_ncols=True, **slow
        )

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; each has `step`, the number of optimizer steps made."""
        if not self._active or not rows:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        for writer in self._writers:
            for row in rows:
                for name, value in row.items():
                    if name != "step" and value is not None:
                        writer.add_scalar(name, value, row["step"])

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
    """Read the rows of a metrics.jsonl; a half-written last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def forget_after(path: Path, step: int) -> None:
    """Remove the rows that were written after the checkpoint of `step`."""
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] <= step]
    if not path.exists() or (len(kept) == len(rows) and path.read_bytes().endswith(b"\n")):
        return
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)
