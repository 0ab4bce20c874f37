"""The denoiser of a model on its prompts, and the path from noise to latents."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.diffusion.samplers import timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.models.finite import NotFiniteError, is_finite
from latentdiff.sampling import (
    Network,
    SamplingPlan,
    build_denoiser,
    last_latents,
    sample_latents,
)

SCHEDULE = NoiseSchedule(ScheduleConfig())
PLAN = SamplingPlan(timestep_grid(SCHEDULE, 4))


class MeanOfContext(nn.Module):
    """Predicts x_t times the mean of the context, and counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.batches: list[int] = []
        self.projected = 0

    def project_context(self, context: Tensor) -> Tensor:
        self.projected += 1
        return context.mean((1, 2))

    def forward(
        self, x_t: Tensor, t: Tensor, context: Tensor | None = None, *, kv: Tensor | None = None
    ) -> Tensor:
        assert x_t.dtype == self.weight.dtype
        self.batches.append(len(x_t))
        mean = kv if context is None else context.mean((1, 2))
        assert mean is not None and len(mean) == len(x_t)
        return x_t * mean.to(x_t.dtype)[:, None, None, None] * self.weight


CONTEXT = torch.stack([torch.full((6, 2), value) for value in (2.0, 4.0)])
X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
T = torch.full((2,), 500)


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize(("tokens", "rows"), [(6, 1), (6, 2), (9, 1), (9, 2)])
def test_a_denoiser_guides_whatever_the_lengths_of_its_contexts(
    tokens: int, rows: int, project: bool
) -> None:
    unet = MeanOfContext()
    network = Network(unet, SCHEDULE, "x0", project)
    denoiser = build_denoiser(network, CONTEXT, torch.full((rows, tokens, 2), 1.0), [3.0, 1.5])
    expected = torch.stack([X[0] * (1 + 3 * (2 - 1)), X[1] * (1 + 1.5 * (4 - 1))])
    for _ in range(2):
        torch.testing.assert_close(denoiser(X, T), expected)
    passes = 1 if tokens == 6 else 2
    assert unet.batches == [4 // passes] * 2 * passes
    assert unet.projected == project * passes


@pytest.mark.parametrize("negative", [None, torch.full((1, 6, 2), 1.0)])
def test_without_guidance_there_is_one_pass_of_the_prompts(negative: Tensor | None) -> None:
    unet = MeanOfContext()
    scale = 5.0 if negative is None else [1.0, 0.0]
    denoiser = build_denoiser(Network(unet, SCHEDULE, "x0"), CONTEXT, negative, scale)
    torch.testing.assert_close(denoiser(X, T), X * torch.tensor([2.0, 4.0])[:, None, None, None])
    assert unet.batches == [2]


def test_guidance_is_computed_in_the_type_of_x_t() -> None:
    network = Network(MeanOfContext(torch.bfloat16), SCHEDULE, "x0")
    found = build_denoiser(network, CONTEXT / 3, torch.ones(1, 6, 2), 3.3)(X, T)
    parts = [
        X.bfloat16() * (m.bfloat16()[:, None, None, None])
        for m in (torch.ones(2), CONTEXT[:, 0, 0] / 3)
    ]
    uncond, cond = (part.float() for part in parts)
    assert torch.equal(found, uncond + 3.3 * (cond - uncond))


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m"])
def test_a_denoiser_that_wraps_another_decides_where_the_path_ends(sampler: str) -> None:
    network = Network(MeanOfContext(), SCHEDULE, "v")
    inner = build_denoiser(network, CONTEXT / 10)
    target, mask = torch.linspace(-1, 1, 9).view(3, 3), torch.arange(9).view(3, 3) % 2 == 0

    def kept(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.where(mask, target, inner(x_t, t))

    plan = SamplingPlan(PLAN.timesteps, sampler)
    found = sample_latents(network, kept, X, [1, 2], plan)
    torch.testing.assert_close(found[..., mask], target[mask].expand(2, 4, -1), rtol=0, atol=1e-5)
    assert not torch.allclose(found[..., ~mask], target[~mask].expand(2, 4, -1), atol=0.1)


def test_the_noise_of_an_image_is_its_seed_s_in_any_batch() -> None:
    network = Network(MeanOfContext(), SCHEDULE, "v")
    plan = SamplingPlan(PLAN.timesteps, "ddpm")
    both = sample_latents(network, build_denoiser(network, CONTEXT / 10), X, [1, 2], plan)
    denoiser = build_denoiser(network, CONTEXT[1:] / 10)
    alone = sample_latents(network, denoiser, X[1:], [2], plan)
    torch.testing.assert_close(both[1:], alone)


def test_no_step_leaves_the_latents_and_the_first_bad_one_is_named() -> None:
    network = Network(MeanOfContext(), SCHEDULE, "x0")
    assert last_latents(network, X, []) is X
    calls: list[int] = []

    def overflow(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return x_t / (len(calls) < 3)

    with pytest.raises(NotFiniteError, match=r"step 3 of 4 \(timestep 250\).*its weights do not"):
        sample_latents(network, overflow, X, [1, 2], PLAN)


def test_all_shards_of_a_tensor_are_asked_whether_they_are_finite() -> None:
    """As DTensor has it: its truth value is that of this process's shard."""
    shard: Any = SimpleNamespace(full_tensor=lambda: torch.tensor(False))
    values: Any = SimpleNamespace(isfinite=lambda: SimpleNamespace(all=lambda: shard))
    assert bool(shard) and not is_finite(values)
