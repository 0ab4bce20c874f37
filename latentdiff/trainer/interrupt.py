"""Stopping in an orderly way: finish the step, write a checkpoint, leave with the signal's code."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupted(Exception):  # noqa: N818  (a request, not an error)
    """The run was asked to stop and its checkpoint is written.

    Attributes: exit_code: 128 + the signal's number, as shells count.
    """

    def __init__(self, number: int, step: int) -> None:
        self.exit_code = 128 + number
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} after step {step}; the checkpoint is written. "
            "Run the same command with --resume to go on."
        )


class StopSignal:
    """Notes SIGTERM and SIGINT inside a `with` block; a second one acts at once.

    Attributes: number: the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)  # type: ignore[arg-type]
        self._old = {}
