import inspect
import threading

import pytest
import torch
from gaussian_oracle import Gaussian, normal
from torch import Tensor

from latentdiff.diffusion.noise import batch_noise, step_noise
from latentdiff.diffusion.prediction import estimate_at
from latentdiff.diffusion.samplers import (
    SAMPLERS,
    Sampler,
    SamplerState,
    as_denoiser,
    dynamic_threshold,
    get_sampler,
    resume,
    run,
    sample,
    split_name,
    timestep_grid,
)
from latentdiff.diffusion.samplers.step import advance
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


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO, FLOW], ids=["vp", "zero", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_states_tell_step_timestep_and_estimate(name: str, schedule: NoiseSchedule) -> None:
    grid = timestep_grid(schedule, 12)
    x_T, noise = batch_noise([1, 2], SHAPE), step_noise([1, 2], SHAPE)
    denoiser = Gaussian().denoiser(schedule)
    states = list(run(name, denoiser, x_T, schedule, grid, noise, clip=0.9))
    assert [state.step for state in states] == list(range(12))
    assert [state.t for state in states] == grid.tolist()
    assert all(s.x_0.abs().max() < 0.9001 for s in states[: -1 if name == "lcm" else None])
    assert all(state.x_t.isfinite().all() for state in states)
    assert x_T.equal(batch_noise([1, 2], SHAPE))  # the start is not overwritten


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO, FLOW], ids=["vp", "zero", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_going_on_from_any_state_gives_the_same_bits(name: str, schedule: NoiseSchedule) -> None:
    grid = timestep_grid(schedule, 7)
    noise, denoiser = step_noise([4], SHAPE), Gaussian().denoiser(schedule)
    states = list(run(name, denoiser, batch_noise([4], SHAPE), schedule, grid, noise))
    for middle in states:
        rest = list(resume(name, middle, denoiser, schedule, grid, noise))
        assert [state.step for state in rest] == list(range(middle.step + 1, 7))
        if rest:
            assert torch.equal(rest[-1].x_t, states[-1].x_t)


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_multistep_samplers_need_their_history(name: str) -> None:
    """What `resume` says: x_t alone is enough for the one-step samplers, and for no other."""
    grid = timestep_grid(SCHEDULE, 7)
    noise = step_noise([4], SHAPE)
    states = list(run(name, DENOISER, batch_noise([4], SHAPE), SCHEDULE, grid, noise))
    forgotten = states[3]._replace(history=())
    *_, last = resume(name, forgotten, DENOISER, SCHEDULE, grid, noise)
    multistep = {"dpmpp_2m", "dpmpp_2m_sde", "unipc", "lms", "pndm"}
    assert torch.equal(last.x_t, states[-1].x_t) == (name not in multistep)


@pytest.mark.parametrize("name", SAMPLERS)
def test_stopping_at_a_level_is_the_state_that_the_whole_run_has_there(name: str) -> None:
    grid = timestep_grid(SCHEDULE, 9).tolist()
    noise, x_T = step_noise([4], SHAPE), batch_noise([4], SHAPE)
    states = list(run(name, DENOISER, x_T, SCHEDULE, grid, noise))
    half = sample(name, DENOISER, x_T, SCHEDULE, grid[:5], noise, final_timestep=grid[5])
    assert torch.equal(half, states[4].x_t)


def test_a_new_sampler_is_one_function_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def toy(denoiser, x, steps, noise, *, push=1.0):
        for step in steps:
            x_0 = estimate_at(denoiser, x, step.now.t)
            x = advance(x, push * x_0, step.now, step.next)
            yield SamplerState(step.number, step.now.t, x, x_0)

    monkeypatch.setitem(SAMPLERS, "toy", Sampler(toy, ("Toy 1",)))
    grid, x_T = timestep_grid(SCHEDULE, 5), batch_noise([1], SHAPE)
    found = sample("toy 1", DENOISER, x_T, SCHEDULE, grid, NOISE, clip=2.0)
    assert torch.equal(found, sample("euler", DENOISER, x_T, SCHEDULE, grid, NOISE, clip=2.0))
    with pytest.raises(ValueError, match="Did you mean 'push'"):
        run("toy", DENOISER, x_T, SCHEDULE, grid, NOISE, pusch=2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_is_longer_than_40_lines(name: str) -> None:
    assert len(inspect.getsource(SAMPLERS[name].function).splitlines()) <= 40


def test_samplers_that_are_one_in_other_coordinates() -> None:
    grid, x_T = timestep_grid(SCHEDULE, 20), batch_noise([1], SHAPE).double()

    def noise(step: int) -> Tensor:
        return batch_noise([1], SHAPE, step).double()

    def result(name: str, **options: float) -> Tensor:
        return sample(name, DENOISER, x_T, SCHEDULE, grid, noise, **options)

    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(result("euler"), result("ddim"), **close)
    torch.testing.assert_close(result("euler_ancestral"), result("ddpm"), **close)
    torch.testing.assert_close(result("euler_ancestral", eta=0.0), result("euler"), **close)
    torch.testing.assert_close(result("dpmpp_2m_sde", eta=0.0), result("dpmpp_2m"), **close)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_last_step_of_no_length_changes_nothing(name: str) -> None:
    """diffusers' set_alpha_to_one=False on a leading grid without offset ends where it is."""
    grid = timestep_grid(SCHEDULE, 6).tolist()
    assert grid[-1] == 0
    x_T = batch_noise([0], SHAPE)
    *_, before, last = run(name, DENOISER, x_T, SCHEDULE, grid, NOISE, final_timestep=0)
    if name not in ("lcm", "unipc"):  # new noise; the corrector still moves the state
        torch.testing.assert_close(last.x_t, before.x_t)
    assert last.x_t.isfinite().all()


def test_dynamic_thresholding_is_that_of_the_paper() -> None:
    x_0 = torch.linspace(-4, 4, 401).reshape(1, 1, 1, -1).repeat(2, 1, 1, 1)
    x_0[1] /= 8  # within ±0.5: left alone
    bound = dynamic_threshold(x_0, 0.9)
    assert bound[0].max() == 1 and bound[0].min() == -1
    torch.testing.assert_close(bound[0, 0, 0, 200:250], x_0[0, 0, 0, 200:250] / 3.6)
    assert torch.equal(bound[1], x_0[1])
    grid, x_T = timestep_grid(SCHEDULE, 5), batch_noise([1], SHAPE)
    for name in SAMPLERS:
        found = sample(name, DENOISER, 9 * x_T, SCHEDULE, grid, NOISE, threshold=0.5)
        assert not torch.equal(found, sample(name, DENOISER, 9 * x_T, SCHEDULE, grid, NOISE)), name


@pytest.mark.parametrize(
    ("schedule", "prediction"), [(ZERO, "v"), (ZERO, "x0"), (FLOW, "flow"), (FLOW, "v")]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_pure_noise_is_a_usable_start(name: str, schedule: NoiseSchedule, prediction: str) -> None:
    """A network that knows the data leads from alpha = 0 to it, whichever way it answers."""
    image = normal((2, *SHAPE), seed=9)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c[0].float() for c in (schedule.alpha(t), schedule.sigma(t)))
        eps = (x_t - alpha * image) / sigma
        return {"v": alpha * eps - sigma * image, "x0": image, "flow": eps - image}[prediction]

    denoiser = as_denoiser(network, schedule, prediction)
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
    assert SAMPLERS["ddim"].options == ("eta", "final_timestep", "clip", "threshold")
    for given, name in (
        ("Euler a", "euler_ancestral"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPM++ 2S a", "dpmpp_2s_ancestral"),
        ("PLMS", "pndm"),
    ):
        assert get_sampler(given) is SAMPLERS[name]
    assert split_name("DPM++ 2M Karras") == ("dpmpp_2m", "karras")
    assert split_name("Heun") == ("heun", None)
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
        (lambda: run("heun", DENOISER, X_T, SCHEDULE, [1], NOISE, clip=0), "clip must be above"),
        (
            lambda: run("heun", DENOISER, X_T, SCHEDULE, [1], NOISE, clip=1, threshold=0.9),
            "give one of them",
        ),
        (lambda: run("lms", DENOISER, X_T, SCHEDULE, [1], NOISE, threshold=2), "threshold must"),
        (lambda: sample("lms", DENOISER, X_T, SCHEDULE, [1], NOISE, order=5), "order of lms"),
        (lambda: sample("unipc", DENOISER, X_T, SCHEDULE, [1], NOISE, order=4), "order of unipc"),
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
