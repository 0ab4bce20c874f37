"""Every sampler against diffusers' scheduler; the whole table is benchmarks/sampler_parity.py."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from sampler_parity import LIMIT, compare
from sampler_peers import PEERS, Cell, Peer, cells, reason_against


@pytest.mark.parametrize("row", PEERS)
def test_results_are_those_of_diffusers(row: str) -> None:
    """v at 5 and 20 steps on two schedules and every grid, and flow.

    Between them lies the number from which on the last step may be of second order.
    """
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    compared = 0
    for cell in cells((5, 20)):
        wanted = cell.schedule in ("scaled_linear", "zero SNR", "flow")
        prediction = "flow" if cell.schedule == "flow" else "eps" if row.startswith("pndm") else "v"
        if cell.row != row or not wanted or cell.prediction != prediction or reason_against(cell):
            continue
        difference = compare(cell)
        if difference is None:  # their grid repeats a timestep
            continue
        assert difference < LIMIT, cell
        compared += 1
    assert compared >= 1
    print(f"{row}: {compared} compared")


def test_every_sampler_has_a_counterpart() -> None:
    from latentdiff.diffusion.samplers import SAMPLERS

    assert {row.split(",")[0] for row in PEERS} == set(SAMPLERS)


def test_a_wrong_sampler_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("dpmpp_2m", "scaled_linear", "v", 10, "linspace")
    wrong = Peer("UniPCMultistep", ("linspace",))
    monkeypatch.setitem(PEERS, "dpmpp_2m", wrong)
    difference = compare(cell)
    assert difference is not None and difference > 10 * LIMIT
