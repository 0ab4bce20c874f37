"""Which of diffusers' schedulers each sampler is compared with, where, and where not and why."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.diffusion.schedule import ScheduleConfig

STEPS = (10, 25, 50)
TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow": "flow_prediction"}
SCHEDULES = {
    "linear": ScheduleConfig("linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": ScheduleConfig(),
    "cosine": ScheduleConfig("cosine"),
    "zero SNR": ScheduleConfig(zero_terminal_snr=True),
    "flow": ScheduleConfig("flow"),
}
EVEN = ("leading", "trailing", "linspace")
ALL = (*EVEN, "karras", "exponential")
KEEPS_SIGNAL = ("leading", "lcm")  # grids that need not start at the last timestep
BROKEN = "diffusers truncates two timesteps of the cosine grid to one, and loses its place"


@dataclass(frozen=True)
class Peer:
    """Which scheduler a sampler is compared with."""

    name: str
    grids: tuple[str, ...]
    module: str = ""
    fields: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    predictions: tuple[str, ...] = ("eps", "x0", "v")
    noisy_ratio_space: bool = False  # its state is x/α
    zero_snr: str = "none"  # none, exact or clamped
    flow: str = ""  # its flow scheduler
    draws: str = ""  # none, argument (variance_noise) or patch (randn_tensor)

    @property
    def scheduler(self) -> str:
        return self.name + "Scheduler"


PEERS: dict[str, Peer] = {
    "ddpm": Peer("DDPM", EVEN, "ddpm", zero_snr="exact", draws="patch"),
    "ddpm, fixed_large": Peer(
        "DDPM", EVEN, "ddpm", (("variance_type", "fixed_large"),), (("variance", "fixed_large"),),
        zero_snr="exact", draws="patch",
    ),
    "ddim": Peer("DDIM", EVEN, "ddim", zero_snr="exact"),
    "ddim, η = 0.7": Peer(
        "DDIM", EVEN, "ddim", (), (("eta", 0.7),), zero_snr="exact", draws="argument"
    ),
    "euler": Peer(
        "EulerDiscrete", ALL, "euler_discrete", noisy_ratio_space=True, zero_snr="clamped",
        flow="FlowMatchEulerDiscrete",
    ),
    "euler_ancestral": Peer(
        "EulerAncestralDiscrete", EVEN, "euler_ancestral_discrete", noisy_ratio_space=True,
        predictions=("eps", "v"), zero_snr="clamped", draws="patch",
    ),
    "heun": Peer(
        "HeunDiscrete", ALL, "heun_discrete", noisy_ratio_space=True,
        flow="FlowMatchHeunDiscrete",
    ),
    "dpmpp_2m": Peer(
        "DPMSolverMultistep", ALL, "dpmsolver_multistep", zero_snr="clamped",
        flow="DPMSolverMultistep",
    ),
    "dpmpp_2m_sde": Peer(
        "DPMSolverMultistep", ALL, "dpmsolver_multistep",
        (("algorithm_type", "sde-dpmsolver++"),), zero_snr="clamped", flow="DPMSolverMultistep",
        draws="argument",
    ),
    "dpmpp_2s_ancestral": Peer(
        "DPMSolverSinglestep", ("exponential",), "dpmsolver_singlestep", (), (("eta", 0.0),)
    ),
    "unipc": Peer(
        "UniPCMultistep", ALL, "unipc_multistep", zero_snr="clamped", flow="UniPCMultistep"
    ),
    "unipc, order 3": Peer(
        "UniPCMultistep", ALL, "unipc_multistep", (("solver_order", 3),), (("order", 3),),
        zero_snr="clamped", flow="UniPCMultistep",
    ),
    "lms": Peer("LMSDiscrete", ALL, "lms_discrete", noisy_ratio_space=True),
    "pndm": Peer(
        "PNDM", EVEN, "pndm", (("skip_prk_steps", True), ("set_alpha_to_one", True)),
        predictions=("eps",),
    ),
    "lcm": Peer("LCM", ("lcm",), "lcm", zero_snr="exact", flow="FlowMatchLCM", draws="patch"),
}  # fmt: skip
#: The field that makes a scheduler end at the first noise level; the others have none.
_END_NOISY = {
    "ddim": ("set_alpha_to_one", False),
    "euler": ("final_sigmas_type", "sigma_min"),
    "dpmpp_2m": ("final_sigmas_type", "sigma_min"),
    "dpmpp_2m_sde": ("final_sigmas_type", "sigma_min"),
    "unipc": ("final_sigmas_type", "sigma_min"),
    "unipc, order 3": ("final_sigmas_type", "sigma_min"),
    "pndm": ("set_alpha_to_one", False),
}
PEERS |= {
    f"{row}, to the first level": dataclasses.replace(
        PEERS[row],
        fields=(*PEERS[row].fields, field),
        options=(*PEERS[row].options, ("final_timestep", 0)),
        flow="",
    )
    for row, field in _END_NOISY.items()
}


#: Schedulers whose timesteps are whole numbers on every grid.
MULTISTEP_PEERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")


class Cell(NamedTuple):
    """One comparison."""

    row: str
    schedule: str
    prediction: str
    steps: int
    grid: str

    @property
    def peer(self) -> Peer:
        return PEERS[self.row]

    @property
    def sampler(self) -> str:
        return self.row.split(",")[0]


def cells(steps: tuple[int, ...] = STEPS) -> Iterator[Cell]:
    """Every combination, those without a counterpart included."""
    for row, peer in PEERS.items():
        for schedule in SCHEDULES:
            grids = ("flow",) if schedule == "flow" else peer.grids
            for prediction in TYPES:
                for n in steps:
                    yield from (Cell(row, schedule, prediction, n, grid) for grid in grids)


def reason_against(cell: Cell) -> str | None:
    """Why diffusers has nothing to compare this cell with; None: it has."""
    peer, flow = cell.peer, cell.schedule == "flow"
    if flow and not peer.flow:
        return f"{peer.scheduler} has no flow"
    if flow and cell.prediction == "v":
        return "v on flow: diffusers' formula for x_0 holds where α² + σ² = 1 only"
    if cell.prediction == "eps" and cell.schedule == "cosine" and cell.grid not in KEEPS_SIGNAL:
        return "eps where the cosine schedule has α = 5·10⁻⁵: x_0 is lost in float32 on both sides"
    if cell.prediction == "eps" and cell.schedule in ("flow", "zero SNR"):
        return "eps where α = 0: refused here, undefined"
    if flow and peer.flow.startswith("FlowMatch") and cell.prediction != "flow":
        return f"{peer.flow}Scheduler takes the flow prediction only"
    if not flow and cell.prediction == "flow":
        return "the flow prediction on a variance-preserving schedule is not in diffusers"
    if not flow and cell.prediction not in peer.predictions:
        if peer.name == "PNDM":
            return "PNDMScheduler has no x0, and averages v itself where this averages ε"
        return f"{peer.scheduler} has no {cell.prediction}"
    if cell.schedule == "zero SNR" and peer.zero_snr == "none":
        return f"{peer.scheduler} has no zero terminal SNR"
    if peer.name in ("DDIM", "PNDM") and cell.grid == "linspace":
        return f"{peer.scheduler} steps by T // n, which is not the next timestep of linspace"
    return None
