"""Error texts that say what was given, what is allowed and how to fix it."""

from __future__ import annotations

import difflib
import functools
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import NoReturn, ParamSpec

P = ParamSpec("P")
#: Exit code of every command for what its user can fix, as of argparse for a wrong option.
BAD_INPUT = 2
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


class UserError(ValueError):
    """Something the user can fix; entry scripts print its text without a traceback.

    The text may quote names from files: all but its line breaks is made `printable`.
    """

    def __str__(self) -> str:
        return "\n".join(map(printable, super().__str__().split("\n")))


def exit_with(error: UserError) -> NoReturn:
    """End a script with the error's text on stderr and the exit code `BAD_INPUT`."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(BAD_INPUT)


def piped(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate the main() of a command: when the reader of its output leaves, it ends quietly.

    Returns: main() that gives 128 + SIGPIPE then, as shells see of other programs before `| head`.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            try:
                return main(*args, **kwargs)
            finally:
                print(end="", flush=True)
        except BrokenPipeError:
            # Python writes at exit what is still in the buffer.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + 13

    return run


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest allowed word, or "" when none is close."""
    close = difflib.get_close_matches(str(given), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def choice_error(name: str, given: object, allowed: Iterable[str]) -> UserError:
    """Build the error for a value outside a fixed set of words."""
    words = list(allowed)
    return UserError(
        f"{name} must be one of {', '.join(words)}; got {given!r}.{did_you_mean(str(given), words)}"
    )
