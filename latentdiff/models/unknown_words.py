"""What a prompt says to other programs or other models, and is read as mere words here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.models.tokenizer import ClipTokenizer

#: A1111's way to load a file from within a prompt: kind, name, weight.
NETWORK = re.compile(r"<(lora|lyco|hypernet):([^>:]*)(?::([^>]*))?>", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(\.\d+)?|-?\.\d+")
_ENDING = re.compile(r"\.(safetensors|pt|bin|ckpt)$", re.IGNORECASE)
#: A1111's weights and chunks, (red:1.3) and BREAK.
_WEIGHT = re.compile(r"\([^()]*:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\bBREAK\b")
#: What learned words are called; a letter, so that signs such as <-> are left alone.
_WORD = re.compile(r"<[^<>\s:]*[^\W\d_][^<>\s:]*>")


def warn_of_unknown_words(
    tokenizer: ClipTokenizer, texts: Iterable[str], a1111: bool = False
) -> None:
    """Warn, once each, of <words> that are not learned and of A1111's <lora:name:1> and (red:1.3).

    Such a prompt works, but its words are read as signs and letters and the picture is another.
    Args: a1111: whether A1111's syntax is understood, and needs no warning.
    """
    found: dict[str, None] = {}
    for text in texts:
        for network in NETWORK.finditer(text) if not a1111 else ():
            found[_say_network(*network.groups())] = None
        if not a1111 and (weight := _WEIGHT.search(text)):
            found[_say_weight(weight[0])] = None
        for word in _WORD.findall(text):
            # A word that was learned is one piece, whatever the number of its vectors.
            if len(tokenizer.pieces(word)) != 1:
                found[_say_word(word)] = None
    for message in found:
        warnings.warn(message, stacklevel=3)


def how_to_load(kind: str, name: str, weight: str | None) -> str:
    """How to do here what <lora:name:weight> does in A1111."""
    if kind.lower() == "hypernet":
        return "hypernetworks are not supported"
    # A1111 knows more after the name (a weight per tower, te=1); here a file has one weight.
    given = _NUMBER.fullmatch((weight or "").split(":")[0])
    number = given.group() if given else "1"
    file = "FILE" if not name else name if _ENDING.search(name) else f"{name}.safetensors"
    return (
        f"load the file with generate.py --lora {file}:{number}, or "
        f"pipeline.load_lora('{file}', {number})"
    )


def _say_network(kind: str, name: str, weight: str | None) -> str:
    shown = f"<{kind}:{name}>" if weight is None else f"<{kind}:{name}:{weight}>"
    return (
        f"the prompt holds {shown!r}, which loads a file in A1111; here it loads nothing and is "
        f"read as words. Take it out; {how_to_load(kind, name, weight)}."
    )


def _say_weight(text: str) -> str:
    return (
        f"the prompt holds {text[:60]!r}, which weighs words or begins a chunk in A1111; here it "
        "is read as words and signs. Draw with generate.py --weighted, or prompt_syntax='a1111'."
    )


def _say_word(word: str) -> str:
    return (
        f"the prompt holds {word!r}, which is not a word that this model has learned; it is read "
        "as signs and letters. Load a textual inversion with generate.py --embedding "
        f'"FILE={word}", or pipeline.load_embedding(file, {word!r}).'
    )
