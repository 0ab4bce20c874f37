"""Images become squares without distortion, in [-1, 1]."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.data.images import fit, to_tensor
from latentdiff.errors import UserError


def ramp(width: int, height: int) -> Image.Image:
    values = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    return Image.fromarray(np.broadcast_to(values, (height, width, 3)).copy())


def test_range_shape_and_channel_order() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 51))
    tensor = to_tensor(image, 4)
    assert tensor.shape == (3, 4, 4) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, -0.6])


def test_an_image_of_the_right_size_is_untouched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    back = ((to_tensor(Image.fromarray(noise), 16) + 1) * 127.5).round().permute(1, 2, 0)
    assert np.array_equal(back.numpy(), noise)


@pytest.mark.parametrize("crop", ["center", "random", "pad"])
@pytest.mark.parametrize("size", [8, (8, 24), (24, 8)])
@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (3, 3), (1, 1), (1, 300), (1000, 7)])
def test_every_shape_fits(crop: str, size: int | tuple[int, int], shape: tuple[int, int]) -> None:
    tensor = to_tensor(Image.new("RGB", shape, (9, 9, 9)), size, crop)  # type: ignore[arg-type]
    assert tensor.shape == (3, *((size, size) if isinstance(size, int) else size))
    if crop != "pad":
        assert torch.allclose(tensor, torch.full_like(tensor, 9 / 127.5 - 1))


def test_center_crop_takes_the_middle_and_keeps_proportions() -> None:
    wide = ramp(64, 16)
    middle = np.asarray(fit(wide, 16))[8, :, 0].astype(int)
    assert np.array_equal(middle, np.asarray(wide)[8, 24:40, 0])
    square_in_the_middle = Image.new("RGB", (100, 50))
    square_in_the_middle.paste((255, 255, 255), (25, 0, 75, 50))
    square = np.asarray(fit(square_in_the_middle, 20)).astype(int)
    assert square[:, 1:-1].min() > 250 and square.min() > 235  # the filter sees past the edge


def test_random_crop_moves_with_its_generator_and_only_with_it() -> None:
    def crop(seed: int) -> torch.Tensor:
        return to_tensor(ramp(64, 16), 16, "random", generator=torch.Generator().manual_seed(seed))

    assert torch.equal(crop(1), crop(1))
    assert len({float(crop(seed)[0, 0, 0]) for seed in range(20)}) > 5


def test_pad_keeps_everything_on_the_background() -> None:
    padded = np.asarray(fit(Image.new("RGB", (20, 10)), 20, "pad", background=(1, 2, 3)))
    assert padded[0, 0].tolist() == [1, 2, 3] and padded[10, 10].tolist() == [0, 0, 0]
    assert (padded == 0).all(axis=2).sum() == 200


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(np.asarray(fit(Image.fromarray(stripes), 8)).astype(int) - 127).max() < 12


def test_unknown_crop() -> None:
    with pytest.raises(UserError, match="Did you mean 'center'"):
        to_tensor(Image.new("RGB", (4, 4)), 4, "centre")  # type: ignore[arg-type]
