"""Prompts with parts that are drawn: `__animal__` from a file's lines, `{red|blue}` from choices.

An image's own seed draws, so its prompt is the same alone, in any batch and on any process. The
file of `__pets/dog__` is pets/dog.txt in the folder of wildcards: one choice a line; empty lines
and those that begin with # are none. What is drawn may hold further such parts.

Source: the syntax is that of stable-diffusion-webui-wildcards and sd-dynamic-prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from latentdiff.data.captions import read_lines
from latentdiff.diffusion.noise import mix
from latentdiff.errors import UserError, did_you_mean

_FILE = re.compile(r"__((?:(?!__)\S)+)__")
#: The innermost braces; those without | are text.
_CHOICES = re.compile(r"\{([^{}]*\|[^{}]*)\}")
#: sd-dynamic-prompts' number of choices, 2$$a|b, and weights, 0.5::a.
_BEYOND = re.compile(r"\s*[\d-]*\$\$|\s*[\d.]+::")
#: A prompt that is drawn from more often than this draws from itself.
_MOST = 1000


class Wildcards:
    """The choices of one folder; a file is read when it is first drawn from.

    Args:    folder: of the files; `{a|b}` needs none in it.
    Raises:  UserError: it is no folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"wildcards must be a folder of .txt files; {folder} is none.")
        self._lists: dict[str, list[str]] = {}

    def expand(self, texts: Sequence[str], seed: int) -> list[str]:
        """Draw for one image, whose texts (prompt, negative prompt) are drawn one after another.

        Raises:  UserError: no such file, or no choice in it; braces that mean something else in
                 sd-dynamic-prompts; a file that draws from itself.
        """
        drawn = 0

        def draw(choices: Sequence[str]) -> str:
            nonlocal drawn
            drawn += 1
            if drawn > _MOST:
                raise UserError(f"the wildcards of {texts[0]!r:.80} draw from themselves.")
            return choices[mix(seed, drawn) % len(choices)]

        return [self._expanded(text, draw) for text in texts]

    def _expanded(self, text: str, draw: Callable[[Sequence[str]], str]) -> str:
        while True:
            if found := _CHOICES.search(text):
                choices = found[1].split("|")
                if beyond := next(filter(_BEYOND.match, choices), None):
                    raise UserError(
                        f"{found[0]!r:.80}: the number or weight in {beyond.strip()!r} is not "
                        "supported; write a choice more often to have it drawn more often."
                    )
            elif found := _FILE.search(text):
                choices = self._lines(found[1])
            else:
                return text
            text = text[: found.start()] + draw(choices) + text[found.end() :]

    def _lines(self, name: str) -> list[str]:
        if name not in self._lists:
            file = self.folder / f"{name}.txt"
            inside = self.folder.resolve() in file.resolve().parents
            if not inside or not file.is_file():
                known = [
                    f.relative_to(self.folder).with_suffix("").as_posix()
                    for f in sorted(self.folder.rglob("*.txt"))
                ]
                raise UserError(
                    f"__{name}__: there is no {name}.txt in {self.folder}."
                    f"{did_you_mean(name, known)}"
                )
            lines = [line.strip() for line in read_lines(file)]
            self._lists[name] = [line for line in lines if line and line[0] != "#"]
            if not self._lists[name]:
                raise UserError(f"__{name}__: {file} holds no choice.")
        return self._lists[name]
