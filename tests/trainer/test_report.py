import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.trainer.curves import MAX_POINTS, Line, chart, smoothed, thinned, ticks
from latentdiff.trainer.environment import read_environment, write_environment
from latentdiff.trainer.report import MAX_GRIDS, write_report
from latentdiff.trainer.validation import write_png


class Page(HTMLParser):
    """Collects tags and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href")]


def make_run(folder: Path, steps: int = 40, grids: int = 2) -> Path:
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 1 / step, "grad_norm": 1.0, "lr": 1e-3}
        if step == 7:
            row |= {"loss": None, "grad_norm": None}
        if step % 10 == 0:
            row |= {"images_per_second": 5.0, "waiting": 0.01, "seconds": step * 1.0}
            row |= {"mfu": 0.42, "peak_memory_mb": 123.0}
        rows.append(row)
    rows.append({"step": steps, "validation_loss": 0.5, "validation_loss_q1": 0.25})
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text('output: "<script>alert(1)</script>"\n')
    for number in range(grids):
        for kind in ("", "-raw"):
            picture = torch.full((3, 4, 4), number, dtype=torch.uint8)
            write_png(picture, folder / "samples" / f"step-{number:08d}{kind}.png")
    write_environment(folder, {"torch": "9.9", "cuda": None})
    return folder


def test_the_report_holds_everything_and_refers_to_nothing(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run")).read_text()
    page = Page(text)
    assert len(page.references) == 4
    assert all(r.startswith("data:image/png;base64,") for r in page.references)
    assert "script" not in page.tags and "&lt;script&gt;" in text
    assert "url(" not in text and "@import" not in text
    for word in ("newest weights", "averaged weights", "9.9", "0.42", "123", "quartile 1"):
        assert word in text, word
    assert "steps skipped (not finite)</td><td>1<" in text
    for svg in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")


def test_many_grids_are_thinned_with_the_first_and_last_kept(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path, grids=40)).read_text()
    assert len(Page(text).references) == 2 * MAX_GRIDS
    assert "step 0, averaged" in text and "step 39, newest" in text


def test_a_run_that_has_just_begun_has_a_report_and_no_run_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no values" in write_report(tmp_path).read_text()


def test_every_start_of_a_run_is_recorded(tmp_path: Path) -> None:
    write_environment(tmp_path, {"torch": "1"})
    write_environment(tmp_path, {"torch": "2"})
    assert [start["torch"] for start in read_environment(tmp_path)] == ["1", "2"]


def test_curves_lie_where_the_values_say() -> None:
    svg = ElementTree.fromstring(chart([Line("<a>", [(0, 1.0), (10, 2.0), (20, 4.0)])], True))
    line = svg.find("{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # doublings are equal steps on a log axis
    assert y2 < y1 < y0  # SVG counts downwards


def test_one_value_and_equal_values_are_drawn() -> None:
    for points in ([(3, 2.0)], [(1, 5.0), (2, 5.0)], [(1, -1.0), (2, 0.0)]):
        ElementTree.fromstring(chart([Line("a", points)], logarithmic=True))


def test_thinning_keeps_the_mean_and_smoothing_is_a_running_mean() -> None:
    points = [(float(n), float(n % 7)) for n in range(7 * MAX_POINTS)]
    thin = thinned(points)
    assert len(thin) == MAX_POINTS
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(3.0)
    assert smoothed([(1, 1.0), (2, 3.0), (3, 8.0)], 2) == [(1, 1.0), (2, 2.0), (3, 5.5)]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.013, 0.061) == pytest.approx([0.02, 0.03, 0.04, 0.05, 0.06])
    assert ticks(5, 5) == [5]
