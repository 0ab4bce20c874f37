import io

import numpy as np
import pytest
import torch
from gaussian_oracle import normal
from PIL import Image
from scipy.ndimage import gaussian_filter

from latentdiff.diffusion.operators import Blur, Downsample, Grey, Identity, Jpeg, Mask

SIZE = (32, 48)
OPERATORS = {
    "identity": Identity(),
    "mask": Mask((normal((1, 1, *SIZE)) > 0).double()),
    "grey": Grey(),
    "blur": Blur(SIZE, 1.0),
    "half": Downsample(SIZE, (16, 24)),
    "odd": Downsample(SIZE, (13, 21)),
    "jpeg": Jpeg(SIZE, 30),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_adjoint_and_pseudo_inverse(operator) -> None:
    x = normal((2, 3, *SIZE), 1, torch.float64)
    y = operator.apply(x)
    other = normal(tuple(y.shape), 2, torch.float64)
    inner = (y * other).sum(), (x * operator.adjoint(other)).sum()
    torch.testing.assert_close(*inner, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(operator.apply(operator.pseudo_inverse(y)), y)


def test_degradations_are_those_of_the_field() -> None:
    x = normal((1, 3, *SIZE), 1, torch.float64)
    blurred = gaussian_filter(x[0].numpy(), (0, 1.5, 1.5), mode="reflect", truncate=4)
    torch.testing.assert_close(Blur(SIZE, 1.5).apply(x)[0], torch.from_numpy(blurred))
    # Enlarged by 13 × 21 without smoothing, every area is a whole number of pixels.
    fine = x.repeat_interleave(13, 2).repeat_interleave(21, 3)
    area = torch.nn.functional.avg_pool2d(fine, SIZE)
    torch.testing.assert_close(Downsample(SIZE, (13, 21)).apply(x), area)


@pytest.mark.parametrize("quality", [5, 10, 30, 75, 95])
def test_jpeg_shows_what_a_jpeg_file_shows(quality: int) -> None:
    ramp = np.linspace(40, 210, SIZE[0] * SIZE[1]).reshape(SIZE)
    waves = 40 * np.sin(np.arange(SIZE[1]) / 2)[None]
    colours = np.stack([ramp + waves, ramp, 255 - ramp], -1).clip(0, 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "JPEG", quality=quality)
    decoder = Image.open(file)
    expected = np.array(decoder).astype(float)
    x = torch.from_numpy(colours).permute(2, 0, 1)[None].double() / 127.5 - 1
    operator = Jpeg(SIZE, quality)
    ours = operator.pseudo_inverse(operator.measure(x))[0].permute(1, 2, 0).numpy()
    # libjpeg smooths the colours when it enlarges them; the brightness has no such choice.
    luma = np.array([0.299, 0.587, 0.114])
    off = ((ours.clip(-1, 1) + 1) * 127.5 - expected) @ luma
    assert np.abs(off).mean() < 0.6 and abs(off.mean()) < 0.1
