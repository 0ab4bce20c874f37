"""Error texts that say what was given, what is allowed and how to fix it."""

from __future__ import annotations

import difflib
import functools
import os
import signal
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import NamedTuple, ParamSpec

P = ParamSpec("P")
#: Exit code of every command for what its user can fix, as of argparse for a wrong option.
BAD_INPUT = 2
_STOPPED = "stopped by Ctrl-C; no file was left half-written."
#: Characters that turn the direction of the text after them: a name could show another ending.
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    r"""Escape what would steer a terminal, break a line or turn the direction of writing.

    For one name, key or caption out of a file; a colour sequence becomes \x1b[31m, a line break \n.
    """
    return "".join(map(_visible, text))


def _visible(sign: str) -> str:
    steers = unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or sign in _TURNING
    return sign.encode("unicode_escape").decode() if steers else sign


def whole_text(text: str) -> str:
    """Replace halves of surrogate pairs (an emoji cut in two), which UTF-8 refuses, by "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


class UserError(ValueError):
    """Something the user can fix; entry scripts print its text without a traceback.

    The text may quote names from files: all but its line breaks is made `printable`.
    """

    def __str__(self) -> str:
        return _lines(super().__str__())


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


class Interrupted(Exception):  # noqa: N818  (a request, not an error)
    """A signal ended the work in good order.

    Attributes: exit_code: 128 + the signal's number, as shells count.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


def command(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate the main() of a command: bad input and Ctrl-C end it in one line on stderr.

    Warnings are a line there too.

    Returns: main() that gives an exit code: what `main` gave (None is 0), `BAD_INPUT` after a
             UserError, 128 + the signal's number after a signal or when the reader has left.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        with _plain_warnings(), _ctrl_c() as signals:
            try:
                try:
                    code = main(*args, **kwargs) or 0
                    if signals.came and code == 0:  # the exception was dropped
                        raise KeyboardInterrupt
                    return code
                finally:
                    print(end="", flush=True)
            except BrokenPipeError:  # the reader of the output has left, as `| head` does
                # Python writes at exit what is still in the buffer.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 128 + 13  # SIGPIPE, which Windows lacks
            except Interrupted as stop:
                text, code = str(stop), stop.exit_code
            except (Exception, KeyboardInterrupt) as error:
                # Compiled code may turn the KeyboardInterrupt of a signal into an error of its own.
                if signals.came or isinstance(error, KeyboardInterrupt):
                    text, code = _STOPPED, 128 + signal.SIGINT
                elif isinstance(error, UserError):
                    text, code = str(error), BAD_INPUT
                else:
                    raise
        # The exception has let go of its frames by now, so progress bars have ended their lines.
        _say(text, code)
        return code

    return run


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings by their words alone, made `printable`, without the line of the code."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_lines(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class _CtrlC:
    """A signal handler that raises KeyboardInterrupt, as Python's own, and notes that it did."""

    came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


@contextmanager
def _ctrl_c() -> Iterator[_CtrlC]:
    """Let SIGINT be noted within the block; of nested blocks the outermost notes."""
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if before is not signal.default_int_handler or not in_main_thread:
        yield before if isinstance(before, _CtrlC) else _CtrlC()
        return
    handler, report, timers = _CtrlC(), sys.unraisablehook, list[threading.Timer]()

    def again(error: sys.UnraisableHookArgs) -> None:
        """Send a SIGINT anew that came within a `__del__`, where Python drops exceptions."""
        if isinstance(error.exc_value, KeyboardInterrupt):
            timers.append(threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]))
            timers[-1].start()
        elif not handler.came:  # what was half made when it came may fail in its own `__del__`
            report(error)

    signal.signal(signal.SIGINT, handler)
    sys.unraisablehook = again
    try:
        yield handler
    finally:
        sys.unraisablehook = report
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for timer in timers:
            timer.cancel()
            timer.join()
        signal.signal(signal.SIGINT, before)


@contextmanager
def ctrl_c_held() -> Iterator[None]:
    """Let a first SIGINT act at the end of the block.

    An exception between taking and releasing a lock of `concurrent.futures` would leave it taken,
    and the pool's threads, for which the process waits at its end, would never end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:  # the second one does not wait
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _say(text: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    if code == BAD_INPUT:
        # Any process may be the one that fails, and the launcher then stops the others.
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {text}", file=sys.stderr)
    elif rank == "0":
        after_mark = "\n" if sys.stderr.isatty() else ""  # the terminal has written ^C
        print(after_mark + text, file=sys.stderr)
    sys.stderr.flush()


class Note(NamedTuple):
    """A warning that was heard."""

    message: str
    about: tuple[str, ...]
    """Texts of the caller that it is about; none: it is about the call."""


_heard: ContextVar[list[Note] | None] = ContextVar("heard warnings", default=None)


@contextmanager
def warnings_heard() -> Iterator[list[Note]]:
    """Collect what `warn` says within the block, in this thread, instead of saying it."""
    notes = list[Note]()
    before = _heard.set(notes)
    try:
        yield notes
    finally:
        _heard.reset(before)


def warn(message: str, *about: str) -> None:
    """Warn at the user's own line, whatever functions of this package or of PyTorch lie between.

    Args:    about: see `Note`.
    """
    heard = _heard.get()
    if heard is not None:
        heard.append(Note(message, about))
        return
    frame, level = sys._getframe(), 1
    while frame.f_globals.get("__name__", "").startswith(("latentdiff.", "torch.")):
        if frame.f_back is None:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest allowed word, or "" when none is close."""
    close = difflib.get_close_matches(str(given), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def choice_error(name: str, given: object, allowed: Iterable[str]) -> UserError:
    """Build the error for a value outside a fixed set of words."""
    return UserError(f"{name} {wrong_word(given, allowed)}")


def wrong_word(given: object, allowed: Iterable[str]) -> str:
    """Return "must be one of a, b; got 'c'.", with the near miss."""
    words = list(allowed)
    return f"must be one of {', '.join(words)}; got {given!r}.{did_you_mean(str(given), words)}"
