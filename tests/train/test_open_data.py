"""Notes on the data of a run before its first step."""

from __future__ import annotations

import dataclasses

import pytest

from latentdiff.train.config import TrainConfig
from latentdiff.train.parts import Latents, none_held_out


def said(train: int, held_out: int, **data: object) -> str:
    config = TrainConfig()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    return "".join(none_held_out(Latents(None, list(range(train)), [0] * held_out), config))


def test_a_set_too_small_for_a_held_out_part_is_told_so_with_the_way_out() -> None:
    text = said(8, 0, validation_share=0.05)
    assert "no image is held out" in text
    assert "of 8 images data.validation_share=0.05 chose none" in text
    assert "data.validation_share=0.2)" in text and "data.split_seed" in text


def test_no_smaller_share_is_called_more() -> None:
    text = said(2, 0, validation_share=0.6)
    assert "Raise" not in text and "Try another data.split_seed" in text


def test_a_stream_is_told_why_nothing_is_held_out() -> None:
    assert "data.streaming=false" in said(0, 0, validation_share=0.05, streaming=True)


@pytest.mark.parametrize(("held_out", "share"), [(1, 0.05), (0, 0.0)])
def test_nothing_is_said_where_some_are_held_out_or_none_was_asked_for(
    held_out: int, share: float
) -> None:
    assert said(8, held_out, validation_share=share) == ""
