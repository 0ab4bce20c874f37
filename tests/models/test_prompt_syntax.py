"""Weights and BREAK in prompts: documented examples, and texts that are built with their answer."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from latentdiff.errors import UserError
from latentdiff.models.prompts import Run, escape, parse


def weights(text: str) -> list[list[tuple[str, float]]]:
    return [[(run.text, round(run.weight, 6)) for run in part] for part in parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # What the web UI's own documentation of the syntax says.
        ("plain words", [("plain words", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", round(1 / 1.1, 6))]),
        ("(red:1.5) (blue: .25 )", [("red", 1.5), (" ", 1), ("blue", 0.25)]),
        ("(red:-1)", [("red", -1)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        (r"\(red\) \[x\] \\", [("(red) [x] \\", 1)]),
        ("(unclosed red", [("unclosed red", 1.1)]),
        ("a) b] c:1.3)", [("a) b] c:1.3)", 1)]),
        ("ratio 16:9, a: b", [("ratio 16:9, a: b", 1)]),
        # Brackets of two kinds need not nest.
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", round(1 / 1.1, 6))]),
        ("", []),
    ],
)
def test_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert weights(text) == [expected]


def test_break_begins_a_part_within_brackets_too() -> None:
    assert weights("a BREAK b") == [[("a", 1)], [("b", 1)]]
    assert weights("(a\nBREAK b:1.2) c") == [[("a", 1.2)], [("b", 1.2), (" c", 1)]]
    assert weights("BREAK a BREAK BREAK b BREAK") == [[], [("a", 1)], [], [("b", 1)], []]
    assert weights("BREAKFAST no break") == [[("BREAKFAST no break", 1)]]


def build(draw: random.Random, depth: int, factor: float) -> tuple[str, list[tuple[str, float]]]:
    """A random text in balanced brackets, and the weight of each of its words."""
    text, words = "", []
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(["word", "word", "round", "square", "number"] if depth else ["word"])
        if kind == "word":
            word = "".join(draw.choices("abc,.é😀 ", k=3)) + r"\("
            text, words = text + word, [*words, (word.replace("\\", ""), factor)]
            continue
        number = draw.choice([0.3, 1.7])
        times = {"round": 1.1, "square": 1 / 1.1, "number": number}[kind]
        inner, found = build(draw, depth - 1, factor * times)
        before, after = {"round": "()", "square": "[]", "number": ("(", f":{number})")}[kind]
        text, words = text + before + inner + after, words + found
    return text, words


def test_nested_brackets_multiply() -> None:
    for seed in range(200):
        text, words = build(random.Random(seed), 4, 1.0)
        expected = [(sign, round(weight, 6)) for word, weight in words for sign in word]
        (part,) = weights(text)
        assert [(sign, weight) for run, weight in part for sign in run] == expected, text


def test_any_text_is_read_or_refused() -> None:
    signs = ["(", ")", "[", "]", "\\", ":", "1.3", "a", " ", "|", "BREAK", "é", "\n", "<", ":)"]
    refused = 0
    for seed in range(500):
        text = "".join(random.Random(seed).choices(signs, k=12))
        words = text.replace("BREAK", "b")
        assert parse(escape(words)) == [[Run(words, 1.0)]]
        try:
            parts = parse(text)
        except UserError:
            refused += 1
            continue
        assert "BREAK" in text or len(parts) == 1
        for part in parts:
            assert all(isinstance(run, Run) and run.text for run in part)
            assert all(a.weight != b.weight for a, b in pairwise(part))
    assert refused < 250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a [cat:dog:0.5] here", r"\[cat:dog:0\.5\].*step to step"),
        ("[hat:10]", "step to step"),
        ("[cow|horse]", "step to step"),
        ("[a [b] | c]", "step to step"),
        ("a cat AND a dog", "AND in capitals"),
        ("a cat <lora:fur:0.8>", "<lora:fur:0.8>.*loads a file"),
        ("(a:1.2.3)", r"must be a number, as in \(red:1\.3\); got '1\.2\.3'"),
        ("(" * 60 + "far", "weight of 'far'.*-100 … 100"),
        ("(far:1e9)", None),
        ("(far:999)", "-100 … 100"),
    ],
)
def test_refused(text: str, message: str | None) -> None:
    if message is None:  # no number in this syntax, so a colon in brackets
        assert weights(text) == [[("far:1e9", 1.1)]]
        return
    with pytest.raises(UserError, match=message):
        parse(text)


def test_signs_can_be_escaped() -> None:
    assert weights(r"\[cat:dog:0.5\] \[a\|b\]") == [[("[cat:dog:0.5] [a|b]", 1)]]
    assert weights(r"[a\|b\:1]") == [[("a|b:1", round(1 / 1.1, 6))]]
