"""Images and masks that users give, by any door: a path, bytes, a Pillow image."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from latentdiff.errors import UserError
from latentdiff.pipelines.image_inputs import GivenImages, read_images, read_masks
from latentdiff.pipelines.masks import (
    composite,
    crop_box,
    in_latents,
    matched,
    padded,
    widened,
)


def as_path(data: bytes, folder: Path, ending: str) -> Path:
    (folder / f"image{ending}").write_bytes(data)
    return folder / f"image{ending}"


DOORS: dict[str, Callable[[bytes, Path, str], Any]] = {
    "path": as_path,
    "text": lambda data, folder, ending: str(as_path(data, folder, ending)),
    "bytes": lambda data, folder, ending: data,
    "Pillow": lambda data, folder, ending: Image.open(io.BytesIO(data)),
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Image.Image, str], Any]:
    def pass_through(image: Image.Image, kind: str = "PNG", **options: Any) -> Any:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return DOORS[request.param](buffer.getvalue(), tmp_path, f".{kind.lower()}")

    return pass_through


def values(inputs: GivenImages) -> np.ndarray:
    """The colours and opacity of the first image, (H, W, C) of 0 … 255."""
    unit = inputs.given[0].permute(1, 2, 0).double().numpy() * 127.5 + 127.5
    assert np.abs(unit - unit.round()).max() < 1e-3
    return unit.round().astype(int)


RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "I;16", "I", "RGB", "RGBA"])
def test_a_grey_ramp_in_every_mode(mode: str, door: Callable[..., Any]) -> None:
    grey = Image.fromarray(RAMP)
    if mode.startswith("I"):
        grey = Image.fromarray(RAMP.astype(np.uint16) * 257)
    elif mode == "P":
        grey = grey.convert("P")
    elif mode != "L":
        grey = grey.convert(mode)
    found = values(read_images(door(grey)))
    assert found.shape == (8, 256, 4 if mode in ("LA", "RGBA") else 3)
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 1] == found[..., 2]).all()
    if mode == "1":
        assert set(np.unique(found)) == {0, 255}
    else:
        assert (found[..., 0] == RAMP).all()


def test_cmyk_has_the_colours_that_pillow_shows(door: Callable[..., Any]) -> None:
    ramp = Image.fromarray(RAMP).convert("CMYK")
    found = values(read_images(door(ramp, "JPEG", quality=100)))
    assert np.abs(found - RAMP[..., None]).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(orientation: int, kind: str, door: Callable[..., Any]) -> None:
    stored = Image.new("RGB", (40, 20), "blue")
    stored.paste("red", (0, 0, 20, 20))
    stored.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    given = door(stored, kind, exif=exif)
    opened = Image.open(io.BytesIO(given)) if isinstance(given, bytes) else given
    right = ImageOps.exif_transpose(
        opened if isinstance(opened, Image.Image) else Image.open(opened)
    )
    for _ in range(2):  # a Pillow image stays as it was
        found = values(read_images(given))
        assert (found == np.asarray(right.convert("RGB"), int)).all()
    assert found.shape[:2] == ((40, 20) if orientation > 4 else (20, 40))


def test_transparency_is_white_to_networks_and_kept_beside_the_colours(
    door: Callable[..., Any],
) -> None:
    image = Image.new("RGBA", (6, 4), (200, 100, 0, 255))
    image.paste((10, 20, 30, 0), (0, 0, 3, 4))
    image.paste((10, 20, 30, 51), (0, 0, 1, 4))
    inputs = read_images(door(image))
    assert (values(inputs) == np.asarray(image, int)).all()
    seen = (inputs.rgb[0, :, 0] * 127.5 + 127.5).T
    expected = [[206, 208, 210], [255, 255, 255], [255, 255, 255], *[[200, 100, 0]] * 3]
    torch.testing.assert_close(seen, torch.tensor(expected).float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        inputs.clear[0, 0, 0], torch.tensor([0.8, 1, 1, 0, 0, 0]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("alpha", [255, 128, 40])
def test_a_mask_is_luminance_times_opacity(alpha: int, door: Callable[..., Any]) -> None:
    grey = Image.new("L", (64, 48))
    grey.paste(alpha, (8, 16, 24, 32))
    mask = Image.new("RGBA", (64, 48), (255, 255, 255, 0))
    mask.paste((255, 255, 255, alpha), (8, 16, 24, 32))
    found = read_masks(door(mask), (48, 64), 2)
    assert torch.equal(found, read_masks(grey, (48, 64), 2)) and found.shape == (2, 1, 48, 64)
    assert (found[1, 0].numpy() * 255).round().astype(np.uint8).tolist() == np.asarray(
        grey
    ).tolist()


def box(size: tuple[int, int], *where: int) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, where)
    return mask


def test_a_mask_of_another_size_is_enlarged() -> None:
    small = box((48, 32), 10, 5, 20, 17)
    enlarged = small.resize((96, 64), Image.Resampling.NEAREST)
    assert torch.equal(read_masks(small, (64, 96), 1), read_masks(enlarged, (64, 96), 1))
    assert torch.equal(read_masks(enlarged, (32, 48), 1), read_masks(small, (32, 48), 1))
    assert read_masks(box((33, 25), 0, 0, 9, 9), (50, 65), 1).shape == (1, 1, 50, 65)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG that says it has 30,000 × 30,000 pixels, in under 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9)))


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()[:900]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nothing.png", "nothing.png: the file does not exist"),
        (b"", "the file is empty"),
        (b"GIF89a", "image cannot be read"),
        (truncated(), "cannot be decoded"),
        (animated("GIF"), "has 2 frames"),
        (animated("WEBP"), "has 2 frames"),
        (animated("TIFF"), "has 2 frames"),
        (Image.open(io.BytesIO(animated("PNG"))), "has 2 frames"),
        (Image.open(io.BytesIO(truncated())), "cannot be decoded"),
        (bomb(), "too large|16,777,216"),
        (Image.new("RGB", (0, 8)), "at least 1 in both directions"),
        (Image.new("1", (8000, 3000)), "16,777,216 pixels"),
        ([], "a list of them or a tensor"),
        (7, "a list of them or a tensor"),
        ([Image.new("L", (8, 8)), Image.new("L", (8, 9))], "8x8 and 8x9"),
        (torch.zeros(1, 2, 8, 8), r"\(N, 3 or 4, height, width\)"),
        (torch.full((3, 8, 8), -1.0), "must lie in 0 … 1"),
        (torch.full((3, 8, 8), torch.nan), "must lie in 0 … 1"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_images(image)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (box((50, 50), 0, 0, 9, 9), "96x64 .* got 50x50"),
        (box((64, 96), 0, 0, 9, 9), "96x64 .* got 64x96"),
        (Image.new("L", (96, 64)), "nothing to paint"),
        (Image.new("RGBA", (96, 64), (255, 255, 255, 0)), "nothing to paint"),
        ([box((96, 64), 0, 0, 9, 9)] * 3, "one for each of the 2 images; got 3"),
        (torch.zeros(64, 96), "nothing to paint"),
        (torch.zeros(3, 64, 96), r"\(N, 1, height, width\)"),
        (animated("GIF"), "mask_image must be one image"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_masks(mask, (64, 96), 2)


@pytest.mark.parametrize("blur", [1, 4, 9])
def test_blur_widens_first(blur: int) -> None:
    """All that was masked is painted in full; beyond 3·blur pixels nothing is."""
    mask = torch.zeros(1, 1, 80, 90)
    mask[..., 40:50, 30:34] = 1
    mask[..., :5, :7] = 1
    soft = widened(mask, blur)
    assert (soft[mask == 1] > 1 - 1e-6).all()
    rows, columns = torch.meshgrid(torch.arange(80.0), torch.arange(90.0), indexing="ij")
    inside = torch.stack([rows, columns], -1).reshape(-1, 2)
    apart = torch.cdist(inside, inside[mask.flatten() == 1]).amin(1).reshape(1, 1, 80, 90)
    assert (soft[apart > 3 * blur] == 0).all() and (soft[apart == blur] > 0.2).all()
    assert torch.equal(widened(mask, 0), mask)


def test_a_latent_is_painted_if_any_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 1, 8, 12)
    mask[0, 0, 3, 4] = 0.1
    assert in_latents(mask, 4).tolist() == [[[[0, 1, 0], [0, 0, 0]]]]
    odd = padded(torch.arange(15.0).reshape(1, 1, 3, 5), 4)
    assert odd.shape == (1, 1, 4, 8) and odd[0, 0, 3].tolist() == [10, 11, 12, 13, 14, 14, 14, 14]


@pytest.mark.parametrize(
    ("where", "padding", "box"),
    [
        ((0, 8, 0, 8), 0, (0, 0, 8, 8)),
        ((0, 8, 0, 8), 32, (0, 0, 40, 40)),
        ((30, 34, 10, 50), 0, (12, 10, 52, 50)),  # grown to the square of the model
        ((60, 64, 0, 96), 0, (0, 0, 64, 96)),
        ((20, 30, 90, 96), 1, (19, 84, 31, 96)),
    ],
)
def test_the_crop_lies_within_the_image(
    where: tuple[int, ...], padding: int, box: tuple[int, ...]
) -> None:
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., where[0] : where[1], where[2] : where[3]] = 0.5
    assert crop_box(mask, padding, (64, 64)) == box


def test_composite_is_the_over_operator_and_leaves_the_rest_to_the_bit() -> None:
    given = torch.rand(1, 4, 1, 3) * 2 - 1
    given[0, 3, 0] = torch.tensor([-1.0, 0.0, 1.0])  # clear, half, opaque
    painted = torch.rand(1, 3, 1, 3) * 2 - 1
    inputs = GivenImages(given)
    assert torch.equal(composite(painted, inputs, torch.zeros(1, 1, 1, 3)), given)
    whole = composite(painted, inputs, torch.ones(1, 1, 1, 3))
    torch.testing.assert_close(whole[:, :3], painted)
    assert (whole[:, 3] == 1).all()
    half = composite(painted, inputs, torch.full((1, 1, 1, 3), 0.5))
    torch.testing.assert_close(half[0, 3, 0], torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(half[0, :3, 0, 0], painted[0, :, 0, 0])
    torch.testing.assert_close(half[0, :3, 0, 2], (painted + given[:, :3])[0, :, 0, 2] / 2)


@pytest.mark.parametrize("reach", [2.0, 8.0])
def test_colours_meet_at_the_border_of_the_mask(reach: float) -> None:
    """A step of height h at a straight border: the shift is h ρ^d with ρ + 1/ρ = 2 + 1/reach²."""
    mask = torch.zeros(1, 1, 6, 60)
    mask[..., 20:] = 1
    given = torch.full((1, 3, 6, 60), 0.25)
    painted = torch.full((1, 3, 6, 60), -0.15)
    found = matched(painted, given, mask, reach)
    trace = 2 + 1 / reach**2
    rho = (trace - (trace**2 - 4) ** 0.5) / 2
    expected = -0.15 + 0.4 * rho ** torch.arange(1, 11)
    torch.testing.assert_close(found[0, 1, 3, 20:30], expected, rtol=0, atol=2e-3)
    assert torch.equal(found[..., :20], painted[..., :20])
    whole = torch.ones(1, 1, 6, 60)
    assert torch.equal(matched(painted, given, whole, reach), painted)
