"""What the evaluation's page says of pictures that are not what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from latentdiff.data.emoji import Drawing, Rendering
from latentdiff.data.styles import BACKGROUNDS, STYLES
from latentdiff.evaluation.metrics import Shown, fit_classifier
from latentdiff.evaluation.prompts import Asked
from latentdiff.evaluation.run import concept_miss, ground_miss, style_miss
from latentdiff.html_report import write_html

DRAWINGS = [Drawing(name, (), b"", False) for name in ("cat", "dog", "owl")]


def asked(row: int, style: str = "plain", ground: str = "white") -> Asked:
    return Asked("a prompt", Rendering(DRAWINGS[row], style, ground), row)


def test_a_concept_is_taken_for_the_nearest_one() -> None:
    gallery = torch.tensor([[1.0, 0, 0], [0, 5.0, 0], [0.8, 0, 0.6]])
    found = torch.tensor([0.7, 0.1, 0.7])
    assert concept_miss(asked(2), found, gallery, DRAWINGS) == ""
    assert concept_miss(asked(0), found, gallery, DRAWINGS) == "taken for owl, right one at 2"
    assert concept_miss(asked(1), found, gallery, DRAWINGS) == "taken for owl, right one at 3"


@pytest.mark.parametrize("seen", BACKGROUNDS)
def test_another_ground_is_named(seen: str) -> None:
    image = Image.new("RGB", (16, 16), BACKGROUNDS[seen])
    assert ground_miss(asked(0, ground=seen), image) == ""
    other = "red" if seen != "red" else "blue"
    assert ground_miss(asked(0, ground=other), image) == f"ground: {seen}"


def test_another_style_is_named() -> None:
    styles = list(STYLES)
    features = torch.eye(len(styles)).repeat(5, 1) + 0.01 * torch.randn(5 * len(styles), 1)
    labels = torch.arange(len(styles)).repeat(5)
    classifier = fit_classifier(features, labels, len(styles))
    for style, one in zip(styles, torch.eye(len(styles)), strict=True):
        assert style_miss(asked(0, style), one, classifier) == ""
        other = styles[styles.index(style) - 1]
        assert style_miss(asked(0, other), one, classifier) == f"style: {style}"


def test_the_page_says_it_and_nothing_where_all_is_well(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    shown = [Shown("a <cat>\u202e", image, image, "ground: red & blue"), Shown("an owl", image)]
    file, facts = tmp_path / "page.html", {"figure": 0.25}.items()
    write_html(file, "evaluation.html", title="<A>", facts=facts, sections={"Concepts": shown})
    text = file.read_text("utf-8")
    assert "<h1>&lt;A&gt;</h1>" in text and "<td>figure</td><td>0.25</td>" in text
    assert r"a &lt;cat&gt;\u202e<span" in text and ">ground: red &amp; blue</span></fig" in text
    assert "an owl</figcaption>" in text and text.count('class="miss"') == 1
    assert text.count('<img src="data:image/png;base64,') == 3
