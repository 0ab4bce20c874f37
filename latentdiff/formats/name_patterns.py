"""peft's patterns of layer names, matched in bounded time whoever wrote them.

What is matched is what peft's `get_pattern_key` matches: patterns are regular expressions for the
whole name or for its end behind a dot, and the first in the file's order counts. Python's `re`
backtracks, so that a short pattern in a stranger's file can take years, and it has no timeout. Here
a pattern maps the set of positions where it may begin to the set where it may end, piece by piece
(Thompson 1968, doi.org/10.1145/363347.363387), and the work for one table is limited.

Source:  github.com/huggingface/peft, src/peft/utils/other.py, 0.21.
"""

from __future__ import annotations

import re
import reprlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: Classes, escapes, groups, characters of names, . | * + ? ^ $; not counted or possessive repeats,
#: references and look-arounds.
_TOKEN = re.compile(
    r"\[\^?(?:[\w.-]|\\[.\-dwDW])+\]|\\[.\-dwDW]|\(\?:|\((?!\?)|[\w.\-|)*?^$]|(?<![*+?])\+"
)
#: Patterns that say a name and no more, with dots for any character: `re` has nothing to try twice.
_NAME = re.compile(r"(?:[\w.-]|\\[.-])*")
_LONGEST, _GROUPS, _MOST = 10_000, 50, 10_000
#: Positions that are looked at for one table: seconds.
_WORK = 5_000_000

#: A text and positions in it where a piece may begin → where it may end.
_Piece = Callable[[str, set[int]], set[int]]


class NamePatterns:
    """A table from patterns to numbers.

    Raises: ValueError: it is no such table, or a pattern is no regular expression of this kind.
    """

    def __init__(self, table: object) -> None:
        if not isinstance(table, Mapping) or len(table) > _MOST:
            raise ValueError(f"{reprlib.repr(table)} is no table of at most {_MOST} patterns")
        self._left = _WORK
        self._rows = [(self._matcher(key), number(value)) for key, value in table.items()]

    def find(self, spellings: Iterable[str]) -> float | None:
        """The number of the first pattern that matches one of a layer's names; None: none does.

        Raises: ValueError: the table takes too much work.
        """
        for matches, value in self._rows:
            if any(map(matches, spellings)):
                return value
        return None

    def _matcher(self, pattern: str) -> Callable[[str], bool]:
        tokens = _TOKEN.findall(pattern)
        if len(pattern) > _LONGEST or pattern.count("(") > _GROUPS or "".join(tokens) != pattern:
            raise ValueError(
                f"the pattern {pattern!r:.60} is too long, or has more of regular expressions than "
                "classes, groups, alternatives, * + and ?"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r:.60} is no regular expression ({error})") from None
        if _NAME.fullmatch(pattern):
            whole = re.compile(rf"(?:.*\.)?{pattern}")
            # The pattern may begin behind each dot, and be followed to the name's end.
            return lambda name: (
                self._spend(1 + len(name) * name.count(".") // 1000) and bool(whole.fullmatch(name))
            )
        piece = _alternatives(deque(tokens), self._spend)
        return lambda name: len(name) in piece(name, {0, *_behind_dots(name)})

    def _spend(self, positions: int) -> bool:
        self._left -= positions
        if self._left < 0:
            raise ValueError("its patterns take too long to match")
        return True


def number(value: Any) -> float:
    """A setting's number. Raises: ValueError: it is none, or too large for one."""
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"{reprlib.repr(value)} is no number") from None


def _behind_dots(name: str) -> list[int]:
    return [i + 1 for i, letter in enumerate(name) if letter == "."]


# The parser takes the tokens of a valid expression from the left.


def _alternatives(tokens: deque[str], spend: Callable[[int], object]) -> _Piece:
    options = [_sequence(tokens, spend)]
    while tokens and tokens[0] == "|":
        tokens.popleft()
        options.append(_sequence(tokens, spend))

    def run(text: str, at: set[int]) -> set[int]:
        spend(len(options) * (1 + len(at)))
        return {end for option in options for end in option(text, at)}

    return run


def _sequence(tokens: deque[str], spend: Callable[[int], object]) -> _Piece:
    pieces = []
    while tokens and tokens[0] not in ("|", ")"):
        piece = _single(tokens, spend)
        if tokens and tokens[0] in ("*", "+", "?"):
            piece = _repeated(piece, tokens.popleft())
            if tokens and tokens[0] == "?":
                tokens.popleft()  # lazy: the same texts match
        pieces.append(piece)

    def run(text: str, at: set[int]) -> set[int]:
        for piece in pieces:
            at = piece(text, at)
        return at

    return run


def _repeated(piece: _Piece, sign: str) -> _Piece:
    def run(text: str, at: set[int]) -> set[int]:
        found, new = set() if sign == "+" else set(at), at
        while new := piece(text, new) - found:
            found |= new
            if sign == "?":
                break
        return found

    return run


def _single(tokens: deque[str], spend: Callable[[int], object]) -> _Piece:
    token = tokens.popleft()
    if token in ("(", "(?:"):
        group = _alternatives(tokens, spend)
        tokens.popleft()  # the closing one
        return group
    if token == "^":
        return lambda text, at: at & {0}
    if token == "$":
        return lambda text, at: at & {len(text)}
    fits = re.compile(token).fullmatch

    def run(text: str, at: set[int]) -> set[int]:
        spend(1 + len(at))
        return {i + 1 for i in at if i < len(text) and fits(text[i])}

    return run
