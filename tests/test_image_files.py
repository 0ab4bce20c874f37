"""Images that are written: nothing is lost by a format's limits or a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentdiff.errors import UserError
from latentdiff.images import check_image_file, grid, save_image

RED = (255, 0, 0)


def test_every_format_that_passes_the_check_can_be_written(tmp_path: Path) -> None:
    passed = set()
    for ending in Image.registered_extensions():
        file = tmp_path / f"a{ending}"
        try:
            check_image_file(file, "--output")
        except UserError:
            continue
        passed.add(ending)
        assert save_image(Image.new("RGB", (16, 16), RED), file) == file
        assert file.stat().st_size > 0
    assert passed >= {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


@pytest.mark.parametrize(
    ("name", "side"), [("wide.webp", 16_384), ("wide.jpg", 65_501), ("wide.gif", 65_536)]
)
def test_an_image_too_large_for_its_format_becomes_a_png(
    name: str, side: int, tmp_path: Path
) -> None:
    wide = Image.new("RGB", (side, 1), RED)
    with pytest.warns(UserWarning, match=rf"cannot hold {side} × 1 pixels.*wide\.png"):
        assert save_image(wide, tmp_path / name) == tmp_path / "wide.png"
    with Image.open(tmp_path / "wide.png") as found:
        assert found.size == (side, 1) and found.getpixel((side - 1, 0)) == RED
    assert [p.name for p in tmp_path.iterdir()] == ["wide.png"]


def test_a_full_disk_leaves_the_older_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_image(Image.new("RGB", (2, 2), RED), tmp_path / "a.jpg")
    before = file.read_bytes()

    def full(self: Any, to: Path) -> None:
        Path(to).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"a\.jpg cannot be written \(No space left"):
        save_image(Image.new("RGB", (2, 2)), file)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpg"] and file.read_bytes() == before


@pytest.mark.parametrize(("columns", "size"), [(None, (22, 10)), (1, (10, 22)), (50, (22, 10))])
def test_a_grid_is_as_wide_as_its_images(columns: int | None, size: tuple[int, int]) -> None:
    assert grid([Image.new("RGB", (10, 10))] * 2, columns).size == size
