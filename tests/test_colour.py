import pytest
import torch

from latentdiff.colour import to_lab, to_srgb, with_lightness

GRID = torch.cartesian_prod(*[torch.linspace(0, 1, 12, dtype=torch.float64)] * 3).T[None, :, None]


def test_lab_of_known_colours() -> None:
    """sRGB's primaries and a grey (Lindbloom's calculator, D65)."""
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0.5, 0.5, 0.5]]).double()
    expected = torch.tensor(
        [
            [53.2408, 80.0925, 67.2032],
            [87.7347, -86.1827, 83.1793],
            [32.2970, 79.1875, -107.8602],
            [100.0, 0.0, 0.0],
            [53.3890, 0.0, 0.0],
        ]
    ).double()
    found = to_lab(colours.T[None, :, None])[0, :, 0].T
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_there_and_back() -> None:
    torch.testing.assert_close(to_srgb(to_lab(GRID)), GRID, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lightness", [0.0, 1.0, 20.0, 53.0, 90.0, 99.5, 100.0])
def test_lightness_is_as_asked_to_1_of_255_after_rounding(lightness: float) -> None:
    wanted = torch.full_like(GRID[:, :1], lightness)
    found = with_lightness(GRID, wanted)
    assert found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(to_lab(found)[:, :1], wanted, rtol=0, atol=1e-3)
    rounded = (found * 255).round() / 255
    assert (to_lab(rounded)[:, :1] - wanted).abs().max() <= 100 / 255
    before, after = to_lab(GRID)[:, 1:], to_lab(found)[:, 1:]
    assert (after.norm(dim=1) <= before.norm(dim=1) + 1e-2).all()
    cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]  # 0: the hue is kept
    assert cross.abs().max() < 0.5
    fits = (to_srgb(torch.cat([wanted, before], 1)) - 0.5).abs().amax(1) <= 0.5
    torch.testing.assert_close(after.norm(dim=1)[fits], before.norm(dim=1)[fits], rtol=0, atol=1e-2)
