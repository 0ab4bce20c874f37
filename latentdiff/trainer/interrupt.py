"""Stopping in an orderly way: the step is finished and its checkpoint written first."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


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
        if kind is None and self.number:  # it came too late to stop what is over by now
            signal.raise_signal(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)  # type: ignore[arg-type]
        self._old = {}
