"""Look-alikes: what counts as one; the banded search misses none that brute force finds."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from damaged import sample_image
from PIL import Image, ImageOps

from latentdiff.doctor import likeness
from latentdiff.doctor.likeness import outline_and_colours, similar_to


def described(images: list[Image.Image]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    both = [outline_and_colours(image)[:2] for image in images]
    return np.array([o for o, _ in both]), np.array([c for _, c in both])


def packed(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def test_scaled_and_repacked_images_are_found_and_others_are_not() -> None:
    whole = [sample_image(n, (320, 256)) for n in range(30)]
    changed = [packed(p.resize((150 + 5 * n, 120 + 4 * n)), 60) for n, p in enumerate(whole)]
    found, complete = similar_to(*described(whole + changed), 6)
    assert complete and found == {30 + n: n for n in range(30)}


@pytest.mark.parametrize("change", [ImageOps.invert, ImageOps.mirror, ImageOps.flip])
def test_another_image_of_the_same_things_is_not_the_same(change: Any) -> None:
    image = sample_image(1, (320, 256))
    assert similar_to(*described([image, change(image)]), 6)[0] == {}


def test_the_same_drawing_in_another_colour_is_not_the_same() -> None:
    image = sample_image(0, (200, 200))
    _, colours = described([image, Image.merge("RGB", image.split()[::-1])])
    same_outline = np.zeros((2, 16), np.uint8)
    assert similar_to(same_outline, colours, 6)[0] == {}
    assert similar_to(same_outline, colours[[0, 0]], 6)[0] == {1: 0}


def test_noise_on_flat_ground_is_no_outline() -> None:
    rng = np.random.default_rng(0)
    flat = [np.uint8(rng.integers(198, 203, (90, 90, 3))) for _ in range(2)]
    outlines = [outline_and_colours(Image.fromarray(p)) for p in flat]
    assert not outlines[0][0].any() and outlines[0][2] and outlines[1][2]
    assert not outline_and_colours(sample_image(0))[2]


def clustered(rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
    """Outlines around a few centres, 0…9 bits away."""
    bits = rng.integers(0, 2, (8, 128), dtype=np.uint8)[rng.integers(0, 8, count)]
    for row in bits:
        row[rng.choice(128, rng.integers(0, 10), replace=False)] ^= 1
    return np.packbits(bits, axis=1)


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 12, 20])
def test_the_banded_search_finds_what_comparing_every_pair_finds(
    distance: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(likeness, "REACH", 200)
    rng = np.random.default_rng(distance)
    outlines = clustered(rng, 150)
    colours = rng.integers(100, 116, (150, 48)).astype(np.uint8)
    apart = np.bitwise_count(outlines[:, None] ^ outlines[None]).sum(axis=2)
    off = np.abs(colours[:, None].astype(int) - colours[None]).max(axis=2)
    near = (apart <= distance) & (off <= likeness.COLOUR_DISTANCE)
    expected: dict[int, int] = {}
    for i in range(150):
        kept = [j for j in range(i) if near[i, j] and j not in expected]
        expected |= {i: kept[0]} if kept else {}
    assert similar_to(outlines, colours, distance) == (expected, True)
    if distance >= 6:
        assert expected


def test_what_goes_looks_like_one_that_stays() -> None:
    """0 ~ 1 ~ 2 but 0 and 2 differ: 1 goes for 0, and 2 stays."""
    bits = np.zeros((3, 128), np.uint8)
    bits[1, :5], bits[2, :10] = 1, 1
    flat = np.zeros((3, 48), np.uint8)
    assert similar_to(np.packbits(bits, axis=1), flat, 6)[0] == {1: 0}


def test_a_crowd_larger_than_the_reach_is_found_whole() -> None:
    count = 5 * likeness.REACH
    found, complete = similar_to(
        np.full((count, 16), 7, np.uint8), np.zeros((count, 48), np.uint8), 6
    )
    assert found == dict.fromkeys(range(1, count), 0)
    assert not complete


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare(count: int) -> None:
    nothing = np.zeros((count, 16), np.uint8), np.zeros((count, 48), np.uint8)
    assert similar_to(*nothing, 6) == ({}, True)
