"""A folder of everything that a data set should not hold, made anew for a test: `write_damaged`.

Each kind is a function from a number to a file; numbers vary size, format and where the damage is.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
ENDING = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
ENDING |= {"TIFF": ".tif"}


class File(NamedTuple):
    """A file of the folder, and the kinds of finding of which one must name it (none: any)."""

    ending: str
    data: bytes
    expected: tuple[str, ...]
    caption: str | bytes | None = None


def sample_image(number: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Smooth and different for each number, so that no two look alike by chance."""
    noise = np.random.default_rng(number).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, depth: int, colour: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


@cache
def packed_zeros(megabytes: float) -> bytes:
    """Zeros, a thousand times smaller."""
    packer = zlib.compressobj(1)
    block = bytes(2**16)
    return b"".join(packer.compress(block) for _ in range(int(megabytes * 16))) + packer.flush()


def truncated(n: int) -> File:
    kind = FORMATS[n % len(FORMATS)]
    data = encode(sample_image(n), kind)
    share = random.Random(n).uniform(0.02, 0.7)
    return File(ENDING[kind], data[: int(len(data) * share)], ("unreadable",))


def wrong_magic(n: int) -> File:
    bodies = (
        b"<!doctype html><title>404 Not Found</title>", b"%PDF-1.7\n1 0 obj", b"PK\x03\x04" * 20,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n/x {x} def x\n",
        b"MZ\x90" + bytes(99), random.Random(n).randbytes(500), b"version https://git-lfs.github",
    )  # fmt: skip
    return File((".png", ".jpg", ".webp")[n % 3], bodies[n % len(bodies)], ("unreadable",))


def right_magic_then_noise(n: int) -> File:
    heads = (
        (".png", b"\x89PNG\r\n\x1a\n"), (".jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"),
        (".gif", b"GIF89a"), (".webp", b"RIFF\x40\x00\x00\x00WEBPVP8 "), (".bmp", b"BM"),
        (".tif", b"II*\x00"), (".avif", b"\x00\x00\x00 ftypavif"), (".ppm", b"P6 9 9 255 "),
    )  # fmt: skip
    ending, head = heads[n % len(heads)]
    return File(ending, head + random.Random(n).randbytes(200), ("unreadable",))


def wrong_ending(n: int) -> File:
    return File(".jpg" if n % 2 else ".gif", encode(sample_image(n), "PNG"), ("ending",))


def zip_bomb(n: int) -> File:
    """Text, profile and pixel data that unpack to a thousand times their size, and wide claims."""
    zeros, rest = packed_zeros(64), chunk(b"IDAT", zlib.compress(bytes(200)))
    bombs = (
        (".png", png(8, 8, 8, 2, chunk(b"zTXt", b"note\0\0" + zeros), rest)),
        (".png", png(8, 8, 8, 2, chunk(b"iCCP", b"name\0\0" + zeros), chunk(b"IDAT", b"x"))),
        (".png", png(30_000, 30_000, 8, 6, chunk(b"IDAT", zeros))),
        (".gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b"\x3b"),
        (".ppm", b"P6 60000 60000 255 " + bytes(99)),
        (".png", png(2**31 - 1, 1, 8, 0, chunk(b"IDAT", b""))),
    )
    return File(*bombs[n % len(bombs)], ("unreadable",))


def huge(n: int) -> File:
    """20,000 × 20,000 pixels: complete, 1 bit each, in 50 kB."""
    rows = packed_zeros(20_000 * 2_501 / 2**20 + 1)
    return File(".png", png(20_000, 20_000, 1, 0, chunk(b"IDAT", rows)), ("unreadable",))


def empty(n: int) -> File:
    return File(ENDING[FORMATS[n % len(FORMATS)]], b"", ("unreadable",))


def cmyk(n: int) -> File:
    kind = ("JPEG", "TIFF")[n % 2]
    return File(ENDING[kind], encode(sample_image(n).convert("CMYK"), kind), ("mode",))


def palette(n: int) -> File:
    image = sample_image(n).quantize(16)
    options = {"transparency": 3} if n % 3 == 0 else {}
    kind = ("PNG", "GIF", "BMP")[n % 3]
    return File(ENDING[kind], encode(image, kind, **options), ("mode",))


def animated(n: int) -> File:
    kind = ("GIF", "WEBP", "PNG", "TIFF")[n % 4]
    frames = [sample_image(n * 10 + i) for i in range(1, 3)]
    return File(
        ENDING[kind],
        encode(sample_image(n * 10), kind, save_all=True, append_images=frames),
        ("animated",),
    )


def odd_mode(n: int) -> File:
    grey = sample_image(n).convert("L")
    deep = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    images = (
        (grey, "PNG"), (grey.convert("1"), "PNG"), (deep, "PNG"), (deep, "TIFF"),
        (grey.convert("F"), "TIFF"), (grey.convert("I"), "TIFF"), (grey.convert("LA"), "PNG"),
        (sample_image(n).convert("RGBA"), "PNG"), (sample_image(n).convert("RGBA"), "WEBP"),
    )  # fmt: skip
    image, kind = images[n % len(images)]
    if image.mode in ("RGBA", "LA"):
        image.putalpha(sample_image(n + 1).convert("L"))
    return File(ENDING[kind], encode(image, kind), ("mode",))


def flipped(n: int) -> File:
    """Single bytes changed somewhere: some decoders notice, some show another image."""
    kind, rng = FORMATS[n % len(FORMATS)], random.Random(n)
    data = bytearray(encode(sample_image(n), kind))
    for _ in range(5):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return File(ENDING[kind], bytes(data), ())


def sideways(n: int) -> File:
    exif = Image.Exif()
    exif[0x0112] = 2 + n % 7
    return File(".jpg", encode(sample_image(n), "JPEG", exif=exif), ("rotated",))


def tiny(n: int) -> File:
    sizes = ((1, 1), (1, 3000), (3000, 2), (7, 7))
    return File(".png", encode(sample_image(n, sizes[n % 4]), "PNG"), ("tiny",))


def again(n: int) -> File:
    """The same three files over and over; nothing is wrong with the first of each."""
    expected = ("duplicate",) if n >= 3 else ()
    return File(".png", encode(sample_image(10**6 + n % 3), "PNG"), expected)


def alike(n: int) -> File:
    """One image, each time scaled and packed anew."""
    side = 90 + 7 * (n % 40)
    image = sample_image(2 * 10**6, (640, 512)).resize((side, round(side * 0.8)))
    expected = ("similar", "duplicate") if n > 0 else ()
    return File(".jpg", encode(image, "JPEG", quality=50 + n % 40), expected)


def no_caption(n: int) -> File:
    data = encode(sample_image(n), "PNG")
    return File(".png", data, ("no-caption",), (None, "", " \n\t", "\ufeff")[n % 4] or b"")


def bad_caption(n: int) -> File:
    captions = (
        ("word " * 400, "long-caption"),
        (b"\xff\xfe\x00caption \xc3\xb1", "other"),
        ("bell \x07 and \x1b[31mred " * 30, "long-caption"),
        ("é" * 900, "long-caption"),
        ("café".encode("cp1252"), "other"),
        ("nul \x00 and more", "other"),
    )
    caption, kind = captions[n % len(captions)]
    return File(".png", encode(sample_image(n), "PNG"), (kind,), caption)


def one_colour(n: int) -> File:
    return File(
        ".png", encode(Image.new("RGB", (70 + n, 70), (n % 256, 9, 9)), "PNG"), ("one-colour",)
    )


def unknown_ending(n: int) -> File:
    return File((".heic", ".psd", "", ".mp4")[n % 4], b"something", ("ignored",))


_MAKERS = (
    truncated, wrong_magic, right_magic_then_noise, wrong_ending, zip_bomb, huge, empty, cmyk,
    palette, animated, odd_mode, flipped, sideways, tiny, again, alike, no_caption, bad_caption,
    one_colour, unknown_ending,
)  # fmt: skip
#: Kind → the function that makes its n-th file.
KINDS: dict[str, Callable[[int], File]] = {maker.__name__: maker for maker in _MAKERS}

#: Added to names in turn; names must not matter to what is done with a file.
NAMES = (
    "", " with spaces ", "\u732b", "e\u0301", "\u00e9", "\U0001f98a", "\u202egnp.exe",
    "<script>x", "'\";&", "new\nline", "%41%00", "x" * 180, "\u2028", "-rf", "\\", "CON",
    "\x1b[31m",
)  # fmt: skip


def write_damaged(folder: Path, count: int) -> dict[str, tuple[str, ...]]:
    """Write `count` damaged or odd files, and one good image for every twenty of them.

    Returns: name → kinds of finding of which one must name it; () when it may pass unnoticed.
    """
    folder.mkdir(parents=True)
    makers = list(KINDS.values())
    expected: dict[str, tuple[str, ...]] = {}
    for n in range(count):
        made = makers[n % len(makers)](n // len(makers))
        name = f"{n:04d}{NAMES[n // 3 % len(NAMES)]}"
        (folder / (name + made.ending)).write_bytes(made.data)
        write_caption(folder / f"{name}.txt", n, made)
        expected[name + made.ending] = made.expected
    for n in range(max(3, count // 20)):
        (folder / f"good-{n}.png").write_bytes(encode(sample_image(5 * 10**6 + n), "PNG"))
        (folder / f"good-{n}.txt").write_text(f"a good image, number {n}")
    return expected


def write_caption(file: Path, n: int, made: File) -> None:
    text = f"image number {n}" if made.caption is None else made.caption
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))


def write_special(folder: Path) -> list[str]:
    """Add what is no plain file; returns their names, empty where the system cannot make them."""
    made = []
    for name, make in (
        ("pipe.png", os.mkfifo),
        ("gone.png", lambda f: os.symlink("nowhere", f)),
        ("device.png", lambda f: os.symlink("/dev/zero", f)),
        ("loop.png", lambda f: os.symlink("loop.png", f)),
        ("sparse.png", lambda f: Path(f).touch()),
    ):
        try:
            make(folder / name)
        except (OSError, AttributeError):
            continue
        (folder / name).with_suffix(".txt").write_text("a caption")
        made.append(name)
    os.truncate(folder / "sparse.png", 20 * 2**30)
    return made


def snapshot(folder: Path) -> dict[str, str]:
    """Everything about a folder that a reader must leave as it is."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        status = entry.stat(follow_symlinks=False)
        plain = entry.is_file(follow_symlinks=False) and status.st_size < 10**8
        content = zlib.crc32(Path(entry.path).read_bytes()) if plain else 0
        facts = [status.st_mode, status.st_size, status.st_mtime_ns, content]
        found[entry.name] = json.dumps(facts)
    return found
