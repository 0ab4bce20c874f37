"""Distances between sets against closed forms and scipy."""

import numpy as np
import pytest
import torch

from latentdiff.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    nearest_distance,
    ranks,
    rbf_distance,
    share_within,
)


def sets(count: int = 400, dimensions: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(count, dimensions, generator=generator)
    second = torch.randn(count // 2, dimensions, generator=generator) * 2 + 1
    return first, second


def test_frechet_distance_equals_the_matrix_root_form():
    linalg = pytest.importorskip("scipy.linalg")
    first, second = (x.double().numpy() for x in sets())
    s1, s2 = np.cov(first.T), np.cov(second.T)
    root = np.real(linalg.sqrtm(s1 @ s2))
    shift = first.mean(0) - second.mean(0)
    expected = shift @ shift + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(*sets()) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_images_than_features():
    first, second = sets(20, 50)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, first + 1) == pytest.approx(50, rel=1e-5)
    assert frechet_distance(first, second) > 1


def test_kernel_distance_is_zero_on_average_for_one_distribution():
    values = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        values.append(kernel_distance(*(torch.randn(60, 8, generator=generator) for _ in "ab")))
    mean, error = np.mean(values), np.std(values) / np.sqrt(len(values))
    assert abs(mean) < 3 * error
    assert kernel_distance(*sets()) > 10 * error


def test_rbf_distance_is_zero_for_one_set_and_grows_with_the_angle():
    first, second = sets()
    assert rbf_distance(first, first) == pytest.approx(0, abs=1e-9)
    x = torch.tensor([[1.0, 0.0]])
    far = 1000 * (2 - 2 * np.exp(-2 / 200))
    assert rbf_distance(x, torch.tensor([[0.0, 1.0]])) == pytest.approx(far)
    assert rbf_distance(first, second) > 0


def test_ranks_and_nearest():
    gallery = torch.eye(4)
    queries = torch.tensor([[0.9, 0.1, 0, 0], [0.6, 0.5, 0.4, 0.0]])
    assert ranks(queries, gallery, torch.arange(4), [0, 2]) == [0, 2]
    # Rows 0 and 3 show concept 0, so it is as near as the nearer of them and counted once.
    assert ranks(queries, gallery, torch.tensor([0, 1, 2, 0]), [2, 2]) == [2, 2]
    assert ranks(gallery[3:], gallery, torch.tensor([0, 1, 2, 0]), [0]) == [0]
    assert share_within([0, 2], 1) == 0.5 and share_within([0, 2], 3) == 1
    assert nearest_distance(gallery[:1], gallery).item() == pytest.approx(0)
