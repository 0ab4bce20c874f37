import threading

import pytest
import torch
from gaussian_oracle import Gaussian, normal
from torch import Tensor

from latentdiff.diffusion.noise import batch_noise, step_noise
from latentdiff.diffusion.samplers import (
    SAMPLERS,
    as_denoiser,
    ddim,
    ddpm,
    get_sampler,
    make_denoiser,
    run,
    sample,
    timestep_grid,
)
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

SCHEDULE = NoiseSchedule(ScheduleConfig())
FLOW = NoiseSchedule(ScheduleConfig(kind="flow"))
ZERO = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
SHAPE = (4, 8, 8)
DENOISER = Gaussian().denoiser(SCHEDULE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_in_any_batch(name: str) -> None:
    grid = timestep_grid(SCHEDULE, 20)

    def generate(seeds: list[int]) -> Tensor:
        x_T, noise = batch_noise(seeds, SHAPE), step_noise(seeds, SHAPE)
        return sample(name, DENOISER, x_T, SCHEDULE, grid, noise)

    whole = generate([1, 2, 3])
    assert torch.equal(generate([2])[0], whole[1])
    assert torch.equal(generate([3, 1]), whole[[2, 0]])


@pytest.mark.parametrize("name", SAMPLERS)
def test_concurrent_runs_do_not_disturb_each_other(name: str) -> None:
    grid = timestep_grid(SCHEDULE, 20)
    x_T, noise = batch_noise([1], SHAPE), step_noise([1], SHAPE)
    alone = sample(name, DENOISER, x_T, SCHEDULE, grid, noise)
    results: list[Tensor] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(sample(name, DENOISER, x_T, SCHEDULE, grid, noise))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, alone) for result in results)
    first, second = (run(name, DENOISER, x_T, SCHEDULE, grid, noise) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.x_t, other.x_t)


@pytest.mark.parametrize("sampler", [ddpm, ddim])
@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO, FLOW])
def test_states_tell_step_timestep_and_estimate(sampler, schedule: NoiseSchedule) -> None:
    grid = timestep_grid(schedule, 12)
    x_T, noise = batch_noise([1, 2], SHAPE), step_noise([1, 2], SHAPE)
    denoiser = Gaussian().denoiser(schedule)
    states = list(sampler(denoiser, x_T, schedule, grid, noise, clip=0.9))
    assert [state.step for state in states] == list(range(12))
    assert [state.t for state in states] == grid.tolist()
    assert all(state.x_0.abs().max() <= 0.9 for state in states)
    assert all(state.x_t.isfinite().all() for state in states)
    assert x_T.equal(batch_noise([1, 2], SHAPE))  # the start is not overwritten


@pytest.mark.parametrize(
    ("schedule", "prediction"), [(ZERO, "v"), (ZERO, "x0"), (FLOW, "flow"), (FLOW, "v")]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_pure_noise_is_a_usable_start(name: str, schedule: NoiseSchedule, prediction: str) -> None:
    """A network that knows the data leads from alpha = 0 to it, whichever way it answers."""
    image = normal((2, *SHAPE), seed=9)

    def network(x_t: Tensor, t: Tensor, context: None) -> Tensor:
        alpha, sigma = (c[0].float() for c in (schedule.alpha(t), schedule.sigma(t)))
        eps = (x_t - alpha * image) / sigma
        return {"v": alpha * eps - sigma * image, "x0": image, "flow": eps - image}[prediction]

    denoiser = make_denoiser(network, None, schedule, prediction)
    grid = timestep_grid(schedule, 25)
    assert grid[0] == schedule.last_timestep
    noise = step_noise([1, 2], SHAPE)
    found = sample(name, denoiser, batch_noise([1, 2], SHAPE), schedule, grid, noise)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-4)


def test_the_network_sees_integers_on_discrete_schedules_and_reals_on_flow() -> None:
    for schedule, dtype in ((SCHEDULE, torch.int64), (FLOW, torch.float32)):
        seen: list[Tensor] = []

        def predict(x_t: Tensor, t: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(t)
            return x_t

        denoiser = as_denoiser(predict, schedule, "v")
        grid = timestep_grid(schedule, 5)
        sample("ddim", denoiser, batch_noise([0, 1], SHAPE), schedule, grid, step_noise([0], SHAPE))
        assert all(t.dtype == dtype and t.shape == (2,) for t in seen)
        assert [t[0].item() for t in seen] == grid.tolist()


def test_grid_defaults_follow_the_schedule() -> None:
    assert timestep_grid(SCHEDULE, 4).tolist() == [750, 500, 250, 0]
    assert timestep_grid(SCHEDULE, 4, steps_offset=1).tolist() == [751, 501, 251, 1]
    assert timestep_grid(ZERO, 4).tolist() == [999, 749, 499, 249]
    assert timestep_grid(FLOW, 4).tolist() == [1000, 750, 500, 250]
    assert timestep_grid(SCHEDULE, 1000, steps_offset=1)[0] == 999


def test_names_and_aliases() -> None:
    assert get_sampler("DDIMScheduler") is get_sampler("ddim") is SAMPLERS["ddim"]
    assert SAMPLERS["ddim"].options == ("eta", "clip", "final_timestep")
    names = [n.lower() for key, row in SAMPLERS.items() for n in (key, *row.aliases)]
    assert len(names) == len(set(names))


X_T, NOISE = batch_noise([0], SHAPE), step_noise([0], SHAPE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_sampler("dppm"), r"got 'dppm'\. Did you mean 'ddpm'"),
        (lambda: run("ddpm", DENOISER, X_T, SCHEDULE, [1], NOISE, eta=1), "takes the options"),
        (lambda: run("ddim", DENOISER, X_T, SCHEDULE, [1], NOISE, ets=1), "Did you mean 'eta'"),
        (lambda: sample("ddim", DENOISER, X_T, SCHEDULE, [1], NOISE, eta=2), "eta must lie"),
        (
            lambda: sample("ddpm", DENOISER, X_T, SCHEDULE, [1], NOISE, variance="small"),
            "Did you mean 'fixed_small'",
        ),
        (lambda: sample("ddim", DENOISER, X_T, SCHEDULE, [1, 5], NOISE), "decrease strictly"),
        (lambda: sample("ddim", DENOISER, X_T, SCHEDULE, [], NOISE), "decrease strictly"),
        (lambda: timestep_grid(SCHEDULE, 0), "number of sampling steps"),
        (lambda: timestep_grid(SCHEDULE, 1001), "number of sampling steps"),
        (lambda: timestep_grid(SCHEDULE, 5, "trailin"), "Did you mean 'trailing'"),
        (lambda: timestep_grid(FLOW, 5, "leading"), "flow schedule starts from pure noise"),
        (lambda: as_denoiser(lambda x, t: x, ZERO, "eps"), "zero_terminal_snr=true"),
    ],
)
def test_faults_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
