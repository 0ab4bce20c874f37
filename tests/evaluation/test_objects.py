"""Objects on a plain ground: how many, which colour, where, and cut out."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from latentdiff.evaluation.objects import (
    HUES,
    colour_word,
    cut_out,
    ground_colour,
    halves,
    objects,
)

Box = tuple[int, int, int, int]


def scene(*boxes: Box, ground: object = "white", fill: object = "red", side: int = 128):
    image = Image.new("RGB", (side, side), ground)
    for box in boxes:
        ImageDraw.Draw(image).rectangle(box, fill=fill)
    return image


@pytest.mark.parametrize(
    ("boxes", "count"),
    [
        ([], 0),
        ([(30, 30, 90, 90)], 1),
        ([(10, 10, 40, 40), (60, 10, 90, 40), (10, 60, 40, 90)], 3),
        ([(20, 20, 60, 60), (62, 20, 100, 60)], 1),  # a gap of one pixel
        ([(20, 20, 60, 60), (100, 100, 103, 103)], 1),  # 16 pixels are too few
        ([(0, 20, 40, 60)], 1),  # touches the edge
    ],
)
@pytest.mark.parametrize("scale", [1, 2])
def test_objects_are_counted(boxes: list[Box], count: int, scale: int) -> None:
    larger = [tuple(scale * v + (scale - 1) * (k > 1) for k, v in enumerate(b)) for b in boxes]
    found = objects(scene(*larger, ground=(60, 110, 220), side=128 * scale))  # type: ignore[arg-type]
    assert found.shape == (count, 128 * scale, 128 * scale)
    areas = found.sum((1, 2)).tolist()
    assert areas == sorted(areas, reverse=True)


def test_a_mask_is_the_drawing_and_no_more() -> None:
    image = scene((30, 30, 89, 59))
    [mask] = objects(image)
    assert torch.equal(mask, torch.from_numpy(np.asarray(image)[..., 1] == 0))


@pytest.mark.parametrize("word", HUES)
def test_a_colour_is_the_nearest_words(word: str) -> None:
    def rgb(degrees: float) -> tuple[int, ...]:
        return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(degrees % 360 / 360, 0.9, 0.9))

    for off in (-8, 0, 8):
        image = scene((20, 20, 99, 99), fill=rgb(HUES[word] + off), ground=(240, 240, 255))
        ImageDraw.Draw(image).rectangle((40, 40, 70, 60), fill="black")
        ImageDraw.Draw(image).rectangle((40, 65, 70, 90), fill=rgb(HUES[word] + 180))
        assert colour_word(image) == word


def test_grey_objects_have_no_colour_word() -> None:
    assert colour_word(scene((20, 20, 99, 99), fill="grey")) is None
    assert colour_word(scene()) is None


def test_the_cut_out_is_centred_on_white() -> None:
    image = cut_out(scene((5, 40, 24, 79), ground=(65, 125, 230)), 100)
    pixels = np.asarray(image).astype(int)
    rows, columns = np.nonzero((pixels != 255).any(2))
    # 20 × 40 pixels fill nine tenths of the height.
    found = (rows.min(), rows.max(), columns.min(), columns.max())
    assert found == pytest.approx((5, 94, 27, 71), abs=1)
    assert pixels[50, 50].tolist() == [255, 0, 0] and pixels[50, 10].tolist() == [255] * 3
    assert np.all(np.asarray(cut_out(scene())) == 255)


def test_ring_and_halves() -> None:
    image = scene((6, 6, 121, 121), ground=(10, 200, 30))
    assert ground_colour(image).tolist() == [10, 200, 30]
    left, right = halves(scene((10, 10, 50, 50)))
    assert left.size == right.size == (64, 128)
    assert len(objects(left)) == 1 and len(objects(right)) == 0
