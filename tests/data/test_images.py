"""Odd images come out as a viewer would show them; broken ones say their name."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from latentdiff.data.images import (
    UnreadableImage,
    display_name,
    open_grey,
    open_image,
    open_with_alpha,
)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes, at: tuple[int, int] = (0, 0), **options: Any) -> tuple[int, ...]:
    image = open_image(data, **options)
    assert image.mode == "RGB"
    value = image.getpixel(at)
    assert isinstance(value, tuple)
    return value


def profile(space: bytes = b"RGB ", gamma: float = 1.0, order: str = "rgb") -> bytes:
    """An ICC profile of sRGB's primaries, in an order of their own, or of grey.

    Source: ICC.1:2001-04, sections 6 and 6.3; sRGB's primaries adapted to D50 as in its profile.
    """
    primaries = {
        "r": (0.43607, 0.22249, 0.01392),
        "g": (0.38515, 0.71687, 0.09708),
        "b": (0.14307, 0.06061, 0.71410),
    }

    def xyz(values: tuple[float, float, float]) -> bytes:
        return struct.pack(">4sI3i", b"XYZ ", 0, *(round(v * 65536) for v in values))

    curve = struct.pack(">4sIIHH", b"curv", 0, 1, round(gamma * 256), 0)
    name = b"made for a test\0"
    tags = {b"desc": struct.pack(">4sII", b"desc", 0, len(name)) + name + bytes(78)}
    tags |= {b"cprt": struct.pack(">4sI", b"text", 0) + b"none\0\0\0\0"}
    tags |= {b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    if space == b"GRAY":
        tags |= {b"kTRC": curve}
    else:
        tags |= {f"{c}TRC".encode(): curve for c in "rgb"}
        tags |= {
            f"{c}XYZ".encode(): xyz(primaries[own]) for c, own in zip("rgb", order, strict=True)
        }
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"test", 0x02400000, b"mntr", space, b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def left_red_right_blue() -> Image.Image:
    image = Image.new("RGB", (16, 8), (255, 0, 0))
    image.paste((0, 0, 255), (8, 0, 16, 8))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = left_red_right_blue()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = open_image(encode(stored, exif=exif))
    assert np.array_equal(np.asarray(shown), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_the_background(mode: str) -> None:
    clear = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert(mode))
    assert pixel(clear) == (255, 255, 255)
    assert pixel(clear, background=(0, 128, 7)) == (0, 128, 7)
    half = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128)).convert(mode))
    assert pixel(half) == (127, 127, 127)


def test_transparent_palette_and_colour_key() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    data = encode(palette, transparency=0)
    assert (pixel(data), pixel(data, (1, 0))) == ((255, 255, 255), (0, 255, 0))
    keyed = encode(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert pixel(keyed) == (255, 255, 255)


def test_grey_one_bit_and_cmyk() -> None:
    assert pixel(encode(Image.new("L", (1, 1), 77))) == (77, 77, 77)
    assert pixel(encode(Image.new("1", (1, 1), 1))) == (255, 255, 255)
    red = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert red[0] > 200 and max(red[1:]) < 60


#: 128/255 of the light, as sRGB encodes it (IEC 61966-2-1).
HALF_OF_THE_LIGHT = round(255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colour_profiles_are_followed(kind: str) -> None:
    half = Image.new("RGB", (8, 8), (128, 128, 128))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    linear = encode(half, kind, icc_profile=profile(), **options)
    assert pixel(linear) == pytest.approx((HALF_OF_THE_LIGHT,) * 3, abs=1)
    turned = encode(Image.new("RGB", (8, 8), (255, 0, 0)), "PNG", icc_profile=profile(order="gbr"))
    assert pixel(turned) == pytest.approx((0, 255, 0), abs=1)  # its "red" is sRGB's green


@pytest.mark.parametrize(
    ("image", "space", "shown"),
    [
        (Image.new("L", (2, 2), 128), b"GRAY", HALF_OF_THE_LIGHT),
        (Image.new("L", (2, 2), 128), b"RGB ", HALF_OF_THE_LIGHT),
        (Image.fromarray(np.full((2, 2), 32896, np.uint16)), b"GRAY", HALF_OF_THE_LIGHT),
        (Image.new("LA", (2, 2), (128, 255)), b"GRAY", HALF_OF_THE_LIGHT),
        (Image.new("RGBA", (2, 2), (128, 128, 128, 255)), b"RGB ", HALF_OF_THE_LIGHT),
        (Image.new("RGBA", (2, 2), (9, 9, 9, 0)), b"RGB ", 255),  # the background is sRGB already
        (Image.new("RGB", (2, 2), (128, 128, 128)).quantize(2), b"RGB ", HALF_OF_THE_LIGHT),
        (Image.new("RGB", (2, 2), (128, 128, 128)), b"GRAY", 128),  # of another kind: no use
    ],
)
def test_colour_profiles_of_every_mode(image: Image.Image, space: bytes, shown: int) -> None:
    data = encode(image, icc_profile=profile(space))
    assert pixel(data) == pytest.approx((shown,) * 3, abs=1)


def test_colour_profiles_that_change_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for harmless in (srgb, b"broken", profile()[:200]):
        shown = open_image(encode(Image.fromarray(noise), icc_profile=harmless))
        assert np.array_equal(np.asarray(shown), noise)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert pixel(encode(cmyk, "TIFF", icc_profile=profile())) == pixel(encode(cmyk, "TIFF"))
    mask = encode(Image.new("L", (2, 2), 128), icc_profile=profile(b"GRAY"))
    assert open_grey(mask).getpixel((0, 0)) == 128


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    shown = open_image(encode(Image.fromarray(ramp), kind))
    assert np.asarray(shown)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_32_bit_integer_and_float_grey() -> None:
    whole = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.int32))
    assert np.asarray(open_image(encode(whole, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32))
    assert np.asarray(open_image(encode(unit, "TIFF")))[0, :, 0].tolist() == [0, 128, 255, 0]
    byte = Image.fromarray(np.array([[0.0, 77.0, 255.0]], dtype=np.float32))
    assert np.asarray(open_image(encode(byte, "TIFF")))[0, :, 0].tolist() == [0, 77, 255]


def png_with_key(pixels: list[list[int]], key: list[int], depth: int) -> bytes:
    """One row of grey or RGB pixels, of which one value is transparent."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    values = [value for pixel in pixels for value in pixel]
    row = struct.pack(f">{len(values)}{'H' if depth == 16 else 'B'}", *values)
    header = struct.pack(">IIBBBBB", len(pixels), 1, depth, 2 if len(key) == 3 else 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    body += chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("pixels", "depth"),
    [
        ([[100], [255], [0]], 8),
        ([[25700], [25701], [65535]], 16),  # in 8 bits the first two are one grey
        ([[0], [1], [65535]], 16),
        ([[18, 0, 255], [18, 1, 255], [255, 0, 0]], 8),
        ([[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5778, 0x9ABC], [65535, 0, 0]], 16),
        ([[0, 200, 0], [0, 51400, 0], [0, 0, 0x200]], 16),  # 200 of 65535 is black
    ],
)
def test_the_transparent_colour_of_a_png_shows_the_background(
    pixels: list[list[int]], depth: int
) -> None:
    data = png_with_key(pixels, pixels[0], depth)
    for ground in ((255, 255, 255), (9, 99, 199)):
        assert pixel(data, (0, 0), background=ground) == ground
        for x in (1, 2):
            shown = [round(v * 255 / (2**depth - 1)) for v in pixels[x]] * (4 - len(pixels[x]))
            found = np.array(pixel(data, (x, 0), background=ground))
            assert np.abs(found - shown[:3]).max() <= 1
    alpha = open_with_alpha(data)[1]
    assert alpha is not None and list(np.asarray(alpha)[0]) == [0, 255, 255]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_deep_grey_takes_no_multiple_of_the_image_in_memory(kind: type) -> None:
    values = (np.arange(2**22) % 65536).astype(kind).reshape(2048, 2048)
    image = encode(Image.fromarray(values), "TIFF")
    tracemalloc.start()
    shown = open_image(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(np.asarray(shown)[..., 0], np.rint(values.astype(np.float64) / 257))
    assert peak < 3 * values.nbytes + 2**24  # its bytes, its array, and a strip of it


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = encode(first, kind, save_all=True, append_images=[second])
    red, _, blue = pixel(data)
    assert red > 240 and blue < 15


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_and_corrupt_files_are_unreadable_by_name(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    for broken in (data[: len(data) // 2], data[:20]):
        with pytest.raises(UnreadableImage) as error:
            open_image(broken, "cat.png")
        assert error.value.name == "cat.png" and error.value.reason


def test_no_damage_ever_escapes_as_another_exception() -> None:
    rng = np.random.default_rng(1)
    data = encode(left_red_right_blue())
    for _ in range(200):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            broken[at] = int(rng.integers(256))
        with contextlib.suppress(UnreadableImage):
            open_image(bytes(broken))


def test_what_is_no_image(tmp_path: Path) -> None:
    for data, reason in [
        (b"", "empty"),
        (b"hello", "not an image but a text file that begins with 'hello'"),
    ]:
        with pytest.raises(UnreadableImage, match=reason):
            open_image(data, "x")
    with pytest.raises(UnreadableImage, match="does not exist"):
        open_image(tmp_path / "none.png")
    with pytest.raises(UnreadableImage, match="cannot be decoded"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("\ufeff  <!DOCTYPE html><title>404".encode(), "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"%PDF-1.7\n1 0 obj", "a PDF document"),
        (b'<?xml version="1.0"?>\n<svg width="3">', "an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "an HEIC image"),
        ("Grüße\n".encode() * 300, "a text file that begins with 'Grüße'"),
        ("é".encode() * 400 + b"x", "a text file"),  # cut within a letter or not
        (b"x" + "é".encode() * 400, "a text file"),
        (b"\x89\x00\x01\x02" * 30, "not an image format that Pillow reads"),
        (b"letters\x00and zeros", "not an image format that Pillow reads"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(data)
    for source in (data, tmp_path / "cat.png"):
        with pytest.raises(UnreadableImage) as error:
            open_image(source, "cat.png")
        assert words in error.value.reason


def test_decompression_bomb_says_how_to_proceed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadableImage, match="MAX_IMAGE_PIXELS"):
        open_image(encode(Image.new("RGB", (100, 100))), "huge.png")


def test_postscript_is_not_run() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableImage, match="PostScript"):
        open_image(data, "drawing.png")


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentdiff.data.images.LARGE_PIXELS", 100)
    inside, most, wait = [0], [0], threading.Event()
    decode = Image.Image.copy

    def slow(self: Image.Image) -> Image.Image:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        wait.wait(0.02)
        inside[0] -= 1
        return decode(self)

    monkeypatch.setattr(Image.Image, "copy", slow)
    data = encode(Image.new("RGB", (20, 20)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_image, [data] * 12))
    assert most[0] == 1


def test_broken_exif_does_not_cost_the_image() -> None:
    data = encode(left_red_right_blue(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert pixel(data) == (255, 0, 0)


def test_names_that_are_not_utf8_become_valid_and_stay_distinct(tmp_path: Path) -> None:
    raw = [os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), b"caf\xe8.png"]
    names = [display_name(os.fsdecode(r)) for r in raw]
    assert names[0].endswith("caf\\xe9.png") and names[1] == "caf\\xe8.png"
    assert all(name.encode("utf-8") for name in names)
