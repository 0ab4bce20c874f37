"""Asks: what is read, what is judged, and the figures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from latentdiff.errors import UserError
from latentdiff.evaluation import asks as module
from latentdiff.evaluation.asks import Ask, Judge, measure_asks, read_asks
from latentdiff.evaluation.metrics import (
    TEXTURE_BLOCKS,
    ClassifierFeatures,
    LinearClassifier,
    own_left_out,
    to_tensors,
)
from latentdiff.evaluation.objects import cut_out
from latentdiff.evaluation.reference import Reference

SHAPES = {"a bar": (10, 40, 90, 60), "a post": (40, 10, 60, 90), "a box": (20, 20, 80, 80)}
FILLS = {"plain": "red", "blue style": "blue"}


def drawn(shape: str, fill: str, at: tuple[int, int] = (0, 0), size: int = 128) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    left, top, right, bottom = SHAPES[shape]
    box = (left + at[0], top + at[1], right + at[0], bottom + at[1])
    ImageDraw.Draw(image).rectangle(box, fill=fill)
    return image


def side_by_side(left: str, right: str) -> Image.Image:
    image = Image.new("RGB", (256, 128), "white")
    image.paste(drawn(left, "red"), (0, 0))
    image.paste(drawn(right, "red"), (128, 0))
    return image


REFERENCE = Reference(
    list(SHAPES),
    [drawn(shape, fill) for shape in SHAPES for fill in FILLS.values()],
    torch.tensor([0, 0, 1, 1, 2, 2]),
    [*FILLS] * 3,
)


class Pixels:
    """Stands in for the classifier's features."""

    def __call__(self, images: Any) -> torch.Tensor:
        return 1 - to_tensors(images, 16).flatten(1)

    textures = __call__


@pytest.fixture(autouse=True)
def perfect_autoencoder(monkeypatch) -> None:
    monkeypatch.setattr(module.metrics, "through_vae", lambda images, autoencoder: images)


@pytest.fixture
def judge(perfect_autoencoder) -> Judge:
    return Judge(REFERENCE, Pixels(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ask", "image", "verdict"),
    [
        (
            {"concept": "a post", "style": "plain"},
            drawn("a post", "red", (30, 5)),
            {"concept top-1": True, "concept top-5": True, "style": True},
        ),
        (
            {"concept": "a bar", "style": "plain"},
            drawn("a post", "blue"),
            {"concept top-1": False, "concept top-5": True, "style": False},
        ),
        (
            {"colour": "blue", "ground": (255, 255, 255), "count": 1},
            drawn("a bar", "blue"),
            {"colour": True, "ground": True, "count": True},
        ),
        (
            {"colour": "blue", "ground": (0, 0, 0), "count": 2},
            drawn("a bar", "red"),
            {"colour": False, "ground": False, "count": False},
        ),
        ({}, drawn("a bar", "red"), {}),
    ],
)
def test_an_image_is_judged_by_what_is_stated(judge, ask, image, verdict) -> None:
    assert judge.verdicts([Ask("x", **ask)], [image]) == [verdict]


def test_each_half_shows_its_own(judge, monkeypatch) -> None:
    monkeypatch.setattr(module, "TOP", 1)
    images = [side_by_side("a bar", "a post"), side_by_side("a post", "a bar")]
    images += [side_by_side("a bar", "a bar")]
    asks = [Ask("x", left="a bar", right="a post")] * 3
    found = [list(verdict.values()) for verdict in judge.verdicts(asks, images)]
    assert found == [[True], [False], [False]]


def test_an_ask_alone_among_others_is_judged_alike(judge) -> None:
    asks = [Ask("x"), Ask("y", style="plain"), Ask("z", concept="a box"), Ask("x", count=1)]
    images = [drawn(shape, "red") for shape in ("a bar", "a post", "a box", "a bar")]
    apart = [judge.verdicts([ask], [image])[0] for ask, image in zip(asks, images, strict=True)]
    assert judge.verdicts(asks, images) == apart


def test_figures_by_group_with_ceilings(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "ClassifierFeatures", lambda device: Pixels())
    monkeypatch.setattr(module, "PerceptualDistance", lambda: lambda a, b: (a - b).abs().mean(1))
    drawn("a post", "red", (10, 0)).save(tmp_path / "post.png")
    asks = [
        Ask("a post", "one", concept="a post", image="post.png"),
        Ask("a bar", "one", concept="a bar"),
        Ask("a box", "more", seeds=3, concept="a box", style="plain"),
    ]
    given = {"a post": "a post", "a bar": "a post", "a box": "a box"}
    seeds = list[int]()

    class Generator:
        seconds, count = 1.0, 5
        pipeline = SimpleNamespace(device=torch.device("cpu"), autoencoder=None)

        def __call__(self, prompts: list[str], seed: int) -> list[Image.Image]:
            seeds.extend(range(seed, seed + len(prompts)))
            fills = ("red", "blue", "red")
            return [drawn(given[p], fills[k % 3]) for k, p in enumerate(prompts)]

    said = list[str]()
    result = measure_asks(asks, tmp_path, REFERENCE, Generator(), said.append)  # type: ignore[arg-type]
    figures = result.figures
    assert figures["one: images"] == 2 and figures["one: concept top-1"] == 0.5
    assert figures["real through VAE: one: concept top-1"] == 1
    order = own_left_out(Pixels()([cut_out(i) for i in REFERENCE.images]), REFERENCE.labels)
    assert figures["real through VAE, own left out: concept top-1"] == order.count(0) / 6
    assert figures["more: style"] == pytest.approx(2 / 3)
    assert figures["more: styles among the seeds"] == 2
    assert figures["more: LPIPS between seeds"] > 0
    assert figures["real through VAE: more: LPIPS between images of a concept"] > 0
    assert [len(page) for page in result.pages.values()] == [2, 3] and len(said) == 3
    assert result.pages["One"][1].miss == "not concept top-1" and result.pages["One"][0].real
    assert len({*seeds}) == 5


def test_a_copy_may_be_moved_scaled_and_mirrored(judge) -> None:
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean((1, 2, 3))

    image = drawn("a post", "red")
    ImageDraw.Draw(image).rectangle((40, 10, 48, 20), fill="white")
    reference = Reference(["a post"], [image], torch.tensor([0]), ["plain"])
    alone = Judge(reference, Pixels(), None)  # type: ignore[arg-type]
    moved = Image.new("RGB", (128, 128), "white")
    moved.paste(ImageOps.mirror(image).resize((96, 96)), (20, 0))
    for copy, shown in ((True, cut_out(moved)), (False, cut_out(drawn("a bar", "red")))):
        assert alone.is_copy(shown, distance) == copy  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: .*"),
        ('{"concept": "a bar"}', "line 2: .*prompt"),
        ('{"prompt": "x", "colour": "teal"}', "line 2: .*colour must be one of red, .*'teal'"),
        ('{"prompt": "x", "left": "a ball"}', "line 2: the reference shows no 'a ball'"),
        ('{"prompt": "x", "style": "gothic"}', "line 2: the reference shows no 'gothic'"),
        ('{"prompt": "x", "concpt": "a bar"}', "line 2: .*concpt"),
    ],
)
def test_a_line_that_cannot_be_measured_is_refused(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "asks.jsonl"
    file.write_text('{"prompt": "a bar", "concept": "a bar"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"(?s){words}"):
        read_asks(file, REFERENCE)


def test_a_file_is_read_as_it_says(tmp_path: Path) -> None:
    file = tmp_path / "asks.jsonl"
    with pytest.raises(UserError, match="cannot be read"):
        read_asks(file, REFERENCE)
    file.write_text("")
    with pytest.raises(UserError, match="has no lines"):
        read_asks(file, REFERENCE)
    row = {"prompt": "é", "group": "g", "ground": [1, 2, 3], "style": "plain", "seeds": 2}
    file.write_text(json.dumps(row) + "\n")
    assert read_asks(file, REFERENCE) == [Ask("é", "g", seeds=2, ground=(1, 2, 3), style="plain")]


def test_the_classifier_finds_a_linear_rule() -> None:
    torch.manual_seed(0)
    labels = torch.arange(600) % 3
    # Two of the classes differ where the scale is small.
    x = torch.randn(600, 5) + 5 * torch.eye(3, 5)[labels]
    x = x * torch.tensor([100.0, 1, 0.01, 1, 1]) + 7
    right = LinearClassifier(x[:500], labels[:500])(x[500:]) == labels[500:]
    assert float(right.float().mean()) > 0.97


def test_ranks_without_the_image_itself() -> None:
    gallery = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [1, 0.2]])
    # The fourth is alone in its concept and nearest to the second.
    assert own_left_out(gallery, torch.tensor([0, 0, 1, 2])) == [0, 1]
    assert own_left_out(gallery, torch.arange(4)) == []


def test_textures_are_the_statistics_of_earlier_maps() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    features = ClassifierFeatures(batch_size=2)
    images = [drawn("a bar", "red"), drawn("a post", "blue"), drawn("a box", "red")]
    net, parts = features._net, []
    with torch.no_grad():
        x = net._swish(net._bn0(net._conv_stem(to_tensors(images, 224))))
        for number, block in enumerate(net._blocks):
            x = block(x)
            if number in TEXTURE_BLOCKS:
                parts += [x.mean((2, 3)), x.flatten(2).std(2)]
    torch.testing.assert_close(features.textures(images), torch.cat(parts, 1), rtol=1e-4, atol=1e-4)
    assert not any(block._forward_hooks for block in net._blocks)
