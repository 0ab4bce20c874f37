import pytest
import torch
from torch import nn

from latentdiff.train.muon import Muon, orthogonalize
from latentdiff.train.optimizer import OptimizerConfig, make_optimizer


@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (48, 32), (32, 288), (288, 32)])
def test_singular_values_become_about_one_and_directions_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    made = orthogonalize(matrix)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ made @ v.T
    off = turned - torch.diag(turned.diagonal())
    assert off.norm() < 0.1 * turned.norm()


@pytest.mark.parametrize("rank", [1, 5])
def test_few_directions_of_a_kernel_stay_few(rank: int) -> None:
    """A Gram matrix rounded to 16 bit fails this: its negative eigenvalues blow up."""
    torch.manual_seed(0)
    matrix = torch.randn(64, rank) @ torch.randn(rank, 640)
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values[rank - 1] > 0.6 and values[0] < 1.3
    assert values[rank] < 0.1


def test_a_step_has_the_size_that_adamw_steps_have() -> None:
    weight = nn.Parameter(torch.zeros(64, 256))
    weight.grad = torch.randn(64, 256)
    group = {"params": [weight], "matrices": True}
    Muon([group], 1e-2, 0.95, (0.9, 0.99), 1e-8, 0.0).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2 * 1e-2, rel=0.25)


def test_vectors_and_the_outer_layers_move_as_adam_moves_them() -> None:
    torch.manual_seed(0)
    net = nn.Module()
    net.conv_in, net.inner, net.norm = nn.Conv2d(2, 4, 3), nn.Linear(4, 4), nn.GroupNorm(2, 4)
    optimizer = make_optimizer(net, OptimizerConfig(kind="muon", lr=1e-2))
    vectors = [*net.conv_in.parameters(), net.inner.bias, *net.norm.parameters()]
    copies = [nn.Parameter(p.detach().clone()) for p in vectors]
    adam = torch.optim.Adam(copies, lr=1e-2, betas=(0.9, 0.99))
    for _ in range(5):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        for parameter, copy in zip(vectors, copies, strict=True):
            copy.grad = parameter.grad.clone()
        optimizer.step()
        adam.step()
    for parameter, copy in zip(vectors, copies, strict=True):
        assert torch.allclose(parameter, copy, atol=1e-6)


def test_weights_in_any_memory_layout_move_alike() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(start.clone(memory_format=layout))
        weight.grad = gradient.clone(memory_format=layout)
        group = {"params": [weight], "matrices": True}
        Muon([group], 1e-2, 0.95, (0.9, 0.99), 1e-8, 0.1).step()
        moved.append(weight.detach())
    assert torch.allclose(*moved, atol=1e-7)


def make_steps(together: bool, bad: frozenset[int] = frozenset()) -> list[torch.Tensor]:
    """Five steps of matrices and vectors; in a step of `bad`, two gradients are not finite."""
    torch.manual_seed(0)
    shapes = [(6, 8), (6, 8), (8, 6), (4, 2, 3, 3), (4, 2, 3, 3)]
    matrices = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    matrices[3].data = matrices[3].data.to(memory_format=torch.channels_last)
    vectors = [nn.Parameter(torch.randn(shape)) for shape in [(7,), (2, 3, 3, 3), (9,)]]
    groups = [{"params": matrices, "matrices": True}, {"params": vectors, "matrices": False}]
    optimizer = Muon(groups, 1e-2, 0.95, (0.9, 0.99), 1e-8, 0.1)
    if together:  # what a GPU does
        optimizer._key = lambda weight, number: tuple(weight.shape)  # type: ignore[method-assign]
    for step in range(5):
        for parameter in matrices + vectors:
            parameter.grad = torch.randn_like(parameter)
        optimizer.found_inf = torch.tensor(float(step in bad))  # type: ignore[attr-defined]
        if step in bad:
            matrices[1].grad, vectors[0].grad = (
                torch.full((6, 8), torch.nan),
                torch.full((7,), torch.inf),
            )
        before = [p.detach().clone() for p in matrices + vectors]
        optimizer.step()
        if step in bad:
            assert all(map(torch.equal, before, matrices + vectors))
    return [p.detach() for p in matrices + vectors]


@pytest.mark.parametrize("bad", [frozenset(), frozenset({2})])
def test_stacked_matrices_move_as_each_would_alone(bad: frozenset[int]) -> None:
    alone, stacked = make_steps(False, bad), make_steps(True, bad)
    assert all(map(torch.allclose, alone, stacked))
    assert all(tensor.isfinite().all() for tensor in alone)
