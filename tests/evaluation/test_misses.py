"""What the evaluation's page says of images that are not what was asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from latentdiff.evaluation.metrics import Shown
from latentdiff.evaluation.reference import Reference
from latentdiff.evaluation.run import concept_miss
from latentdiff.html_report import write_html


def test_a_concept_is_taken_for_the_nearest_one() -> None:
    gallery = torch.tensor([[1.0, 0, 0], [0, 5.0, 0], [0.8, 0, 0.6], [0, 0, -1.0]])
    reference = Reference(["cat", "dog", "owl"], [], torch.tensor([0, 1, 2, 2]))
    found = torch.tensor([0.7, 0.1, 0.7])
    assert concept_miss(2, found, gallery, reference) == ""
    assert concept_miss(0, found, gallery, reference) == "taken for owl, right one at 2"
    assert concept_miss(1, found, gallery, reference) == "taken for owl, right one at 3"


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
