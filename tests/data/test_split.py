"""The split: shares met, groups kept whole, nobody moved by newcomers."""

from __future__ import annotations

import pytest

from latentdiff.data.source import split
from latentdiff.errors import UserError


class Named:
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]


def test_parts_are_a_partition_of_the_asked_share() -> None:
    train, held_out = split(Named([f"{i}.png" for i in range(5000)]), 0.1)
    assert sorted(train + held_out) == list(range(5000))
    assert 420 < len(held_out) < 580  # 500 ± 3.8 standard deviations


def test_adding_and_removing_files_moves_no_other() -> None:
    names = [f"{i}.png" for i in range(500)]
    more = sorted([*names[10:], *(f"new-{i}.png" for i in range(300))])
    before = {names[i] for i in split(Named(names), 0.2)[1]}
    after = {more[i] for i in split(Named(more), 0.2)[1]}
    assert before & set(more) == after & set(names)


def test_seeds_differ() -> None:
    source = Named([f"{i % 100}/{i}" for i in range(1000)])
    train, held_out = split(source, 0.3)
    assert split(source, 0.3, seed=1)[1] != held_out
    assert split(source, 0.3) == (train, held_out)


def test_edges() -> None:
    assert split(Named(["a", "b"]), 0.0) == ([0, 1], [])
    assert split(Named(["a"]), 0.999999) == ([0], [])  # training is never empty
    assert split(Named(["bad\udce9"]), 0.5)
    for share in (1.0, -0.1):
        with pytest.raises(UserError, match="validation_share"):
            split(Named(["a"]), share)
