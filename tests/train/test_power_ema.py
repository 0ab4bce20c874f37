import sys
from pathlib import Path

import pytest
import torch
from tiny_training import arguments, make_parts
from torch import Tensor, nn

from latentdiff.config import load_config
from latentdiff.errors import UserError
from latentdiff.train.checkpoint import read_into, write_tensors
from latentdiff.train.config import TrainConfig
from latentdiff.train.ema import (
    Ema,
    PowerEma,
    PowerEmaConfig,
    PowerEmas,
    averages,
    reconstruct,
    snapshots,
)

STEPS = 400
LENGTHS = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2)


def path_of_weights(step: int) -> Tensor:
    """Where training might have the weights: a decaying drift, an oscillation and noise."""
    noise = torch.randn(6, generator=torch.Generator().manual_seed(step))
    drift = torch.linspace(-1, 1, 6) * (1 - 0.99**step)
    return drift + 0.3 * torch.sin(torch.tensor(step / 23.0)) + 0.1 * noise


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, Tensor]]:
    """A folder of stored averages, and averages of other lengths tracked directly beside it."""
    folder = tmp_path_factory.mktemp("power")
    module = nn.Linear(3, 2, bias=False)
    powers = PowerEmas(module, PowerEmaConfig(every=10, dtype="float32"), folder, writes=True)
    direct = {length: PowerEma(module, length) for length in LENGTHS}
    for step in range(STEPS):
        with torch.no_grad():
            module.weight.copy_(path_of_weights(step).view(2, 3))
        powers.update(step)
        for average in direct.values():
            average.update(step)
    return folder, {length: average.average["weight"] for length, average in direct.items()}


@pytest.mark.parametrize("length", LENGTHS)
def test_reconstruction_equals_the_average_tracked_directly(length, run) -> None:
    folder, direct = run
    found = reconstruct(folder, length)
    assert found.step == STEPS
    # The weights are of size 1; what is left is the profile's misfit, largest below σ_rel 0.05.
    tolerance = 1e-6 if length in (0.05, 0.1) else 0.5 * found.misfit + 1e-5
    torch.testing.assert_close(found.weights["weight"], direct[length], rtol=0, atol=tolerance)
    assert found.misfit < 0.01


def test_lengths_differ_by_more_than_the_tolerance(run) -> None:
    _, direct = run
    assert float((direct[0.07] - direct[0.1]).abs().max()) > 0.01


def test_it_can_end_at_an_earlier_step_and_at_one_without_a_snapshot(run) -> None:
    folder, _ = run
    module = nn.Linear(3, 2, bias=False)
    track = PowerEma(module, 0.1)
    for step in range(205):
        with torch.no_grad():
            module.weight.copy_(path_of_weights(step).view(2, 3))
        track.update(step)
        if step + 1 == 200:
            exact = track.average["weight"].clone()
    torch.testing.assert_close(reconstruct(folder, 0.1, 200).weights["weight"], exact)
    between = reconstruct(folder, 0.1, 205)
    assert between.step == 205
    assert between.misfit > 0.1  # the last five steps are in no snapshot, and it says so
    with pytest.raises(UserError, match="first averages are of step 10"):
        reconstruct(folder, 0.1, 9)


def test_the_first_random_weights_are_forgotten() -> None:
    module = nn.Linear(2, 2)
    track = PowerEma(module, 0.1)
    with torch.no_grad():
        module.weight.fill_(3.0)
    track.update(0)
    assert torch.equal(track.average["weight"], torch.full((2, 2), 3.0))


def test_stored_state_goes_on_exactly_and_missing_state_is_an_error(tmp_path: Path) -> None:
    module, config = nn.Linear(2, 2), PowerEmaConfig(every=100)
    powers = PowerEmas(module, config, tmp_path, writes=False)
    everything = averages(Ema(module, 0.9), powers)
    powers.update(0)
    kept = {name: value.clone() for name, value in everything.items()}
    assert {"weight", "power-0/weight", "power-1/bias"} <= set(kept)
    powers.update(1)
    write_tensors(tmp_path, "ema", kept | {"power-2/bias": kept["bias"].clone()})
    read_into(tmp_path, "ema", everything)
    assert torch.equal(powers.tracks[1].average["bias"], kept["power-1/bias"])
    fewer = {n: v for n, v in kept.items() if not n.startswith("power-1")}
    write_tensors(tmp_path, "ema", fewer)
    with pytest.raises(UserError, match=r"power_ema\.every=0"):
        read_into(tmp_path, "ema", everything)


def test_without_every_nothing_is_tracked_and_nothing_written(tmp_path: Path) -> None:
    powers = PowerEmas(nn.Linear(2, 2), PowerEmaConfig(), tmp_path, writes=True)
    powers.update(0)
    powers.store(1)
    assert not powers.tracks and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"power_ema.every=N"):
        snapshots(tmp_path)


def test_bad_lengths_are_refused_with_the_configuration() -> None:
    with pytest.raises(UserError, match=r"sigma_rel must lie above 0 .*got 0\.5"):
        load_config(TrainConfig, None, ["power_ema.every=10", "power_ema.sigma_rel=[0.5]"])


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    PowerEmas(nn.Linear(2, 2), PowerEmaConfig(every=5), tmp_path, writes=True).store(5)
    file = tmp_path / "ema" / "step-00000005.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="step-00000005"):
        reconstruct(tmp_path, 0.1)


@pytest.mark.slow
def test_the_script_writes_a_model_folder_from_a_run(tmp_path: Path, image_folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
    from reconstruct_ema import main
    from train_latent import main as train

    from latentdiff.formats.folder import load_components

    parts, output = make_parts(tmp_path / "parts"), tmp_path / "run"
    given = ["power_ema.every=2", "power_ema.dtype=float32", "export.dtype=float32"]
    assert train(arguments(parts, image_folder, output, *given)) == 0
    assert [s.step for s in snapshots(output)] == [2, 4, 6]
    assert main([str(output), "--sigma-rel", "0.1", "0.05"]) == 0
    wanted = reconstruct(output, 0.1).weights
    unet = load_components(output / "model-sigma-0.1").unet
    assert set(wanted) <= set(unet.state_dict())
    for name, value in wanted.items():
        assert torch.equal(unet.state_dict()[name], value), name
    assert main([str(output), "--sigma-rel", "0.9"]) == 2
    assert main([str(tmp_path), "--sigma-rel", "0.1"]) == 2
