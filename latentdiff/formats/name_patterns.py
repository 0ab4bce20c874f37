"""peft's patterns of layer names, matched in bounded time whoever wrote them.

What is matched is what peft's `get_pattern_key` matches: patterns are regular expressions for the
whole name or for its end behind a dot, and the first in the file's order counts. Backtracking can
make a short pattern in a stranger's file take years, and Python's `re` has no timeout; `regex`,
which understands the patterns allowed here as `re` does, has one.

Source:  github.com/huggingface/peft, src/peft/utils/other.py, 0.21.
"""

from __future__ import annotations

import re
import reprlib
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import regex

#: Classes, escapes, groups, characters of names, . | * + ? ^ $; not counted or possessive repeats,
#: references and look-arounds.
_ALLOWED = re.compile(
    r"(?:\[\^?(?:[\w.-]|\\[.\-dwDW])+\]|\\[.\-dwDW]|\(\?:|\((?!\?)|[\w.\-|)*?^$]|(?<![*+?])\+)*"
)
#: Characters of a pattern and of a table's together; groups within each other, each of which may
#: double what the pattern is compiled to.
_LONGEST, _LONGEST_TABLE, _DEEPEST = 10_000, 200_000, 4
#: CPU time for one table; a thousand patterns on a thousand names take a fifth of it.
SECONDS = 5.0


class NamePatterns:
    """A table from patterns to numbers.

    Raises: ValueError: it is no such table, or a pattern is no regular expression of this kind.
    """

    def __init__(self, table: object) -> None:
        if not isinstance(table, Mapping) or sum(map(len, table)) > _LONGEST_TABLE:
            raise ValueError(
                f"{reprlib.repr(table)} is no table of patterns of at most {_LONGEST_TABLE:,} "
                "characters"
            )
        self._left = SECONDS
        self._rows = [(_compiled(key), number(value)) for key, value in table.items()]

    def find(self, spellings: Sequence[str]) -> float | None:
        """The number of the first pattern that matches one of a layer's names; None: none does.

        Raises: ValueError: the table takes too much work.
        """
        for pattern, value in self._rows:
            if any(self._matches(pattern, name) for name in spellings):
                return value
        return None

    def _matches(self, pattern: Any, name: str) -> bool:
        start = time.process_time()
        try:
            if self._left > 0:  # otherwise the library takes it for no limit
                return pattern.fullmatch(name, timeout=self._left) is not None
        except TimeoutError:
            pass
        finally:
            self._left -= time.process_time() - start
        raise ValueError("its patterns take too long to match")


def _compiled(pattern: str) -> Any:
    depth = max(accumulate({"(": 1, ")": -1}.get(sign, 0) for sign in pattern), default=0)
    if len(pattern) > _LONGEST or depth > _DEEPEST or not _ALLOWED.fullmatch(pattern):
        raise ValueError(
            f"the pattern {pattern!r:.60} could take too long to match, or has more of regular "
            "expressions than classes, groups, alternatives, * + and ?"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r:.60} is no regular expression ({error})") from None
    return regex.compile(rf"(?:.*\.)?(?:{pattern})")


def number(value: Any) -> float:
    """A setting's number. Raises: ValueError: it is none, or too large for one."""
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"{reprlib.repr(value)} is no number") from None
