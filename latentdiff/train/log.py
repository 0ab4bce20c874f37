"""What a run writes down: metrics.jsonl always; TensorBoard, W&B if wanted; a progress bar.

Every start adds what it ran on to OUTPUT/environment.json.

Beside the loss it gives memory and

    MFU = images/s · FLOPs per image / (peak FLOPs per second · devices)

the model FLOPs utilisation. FLOPs per image are those of the U-Net's forward and backward pass,
counted once at the start on the meta device, where nothing is computed: matrix products,
convolutions and attention, a multiplication and an addition counting as two. What gradient
checkpointing computes again does not count. The peak is the data sheet's (dense) for known GPUs;
elsewhere it is measured with a matrix product, so there 100 % is what this machine does at its
best.

Source: Chowdhery et al. 2022, appendix B, arXiv:2204.02311.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.errors import UserError
from latentdiff.files import write_text
from latentdiff.models.unet import UNet

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentdiff.formats.folder import Components
    from latentdiff.train.loop import LoopConfig
    from latentdiff.train.parts import Latents

METRICS = "metrics.jsonl"
_NO_TENSORBOARD = (
    "note: no curves for TensorBoard, which is not installed: `pip install 'latentdiff[tracking]'` "
    "(or set loop.tensorboard=false). metrics.jsonl has all numbers."
)


class Tracker:
    """Writes rows of numbers; does nothing on processes other than the main one.

    Args:
        folder: the run's output folder.
        first_step: steps made so far; later rows of an interrupted run are removed.
        config: its max_steps (end of the progress bar), tensorboard (event files too, if the
            package is installed) and wandb (a project to log to as well) are used.
        active: whether this process writes.
        about: the whole configuration, for W&B.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        config: LoopConfig,
        active: bool,
        about: dict[str, Any] | None = None,
    ) -> None:
        self._active, self._has_shown = active, False
        if not active:
            return
        self._path = folder / METRICS
        forget_after(self._path, first_step)
        self._unwritten: list[str] = []
        self._writers: list[Any] = []  # with SummaryWriter's add_scalar, add_image and close
        if config.wandb is not None:
            self._writers.append(WandbWriter(config.wandb, folder, about))
        events = _summary_writer(folder / "tensorboard", first_step) if config.tensorboard else None
        if events is not None:
            self._writers.append(events)
        from tqdm import tqdm

        slow: Any = {} if sys.stderr.isatty() else {"mininterval": 30.0, "maxinterval": 60.0}
        self._bar: Any = tqdm(
            total=config.max_steps, initial=first_step, unit="step", dynamic_ncols=True, **slow
        )
        if config.tensorboard and events is None:
            self.say(_NO_TENSORBOARD)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; each has `step`, the number of optimizer steps made."""
        if not self._active or not rows:
            return
        self._unwritten += [json.dumps(row) + "\n" for row in rows]
        with self.tolerate_failure(METRICS):
            _append(self._path, "".join(self._unwritten))
            self._unwritten = []
        with self.tolerate_failure("a file of TensorBoard or W&B"):
            for writer in self._writers:
                for row in rows:
                    for name, value in row.items():
                        if name != "step" and value is not None:
                            writer.add_scalar(name, value, row["step"])

    @contextmanager
    def tolerate_failure(self, what: str) -> Iterator[None]:
        """Warn, and let the training go on, where `what` cannot be written: a full disk, say."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            self.say(f"warning: {what} could not be written ({reason}). Training goes on.")

    def progress(self, step: int, shown: Mapping[str, str]) -> None:
        """Move the bar to a step and show some words beside it."""
        if self._active:
            self._bar.set_postfix(shown, refresh=False)
            drawn = self._bar.update(step - self._bar.n)
            if not (drawn or self._has_shown):  # the first is not held back as others may be
                self._bar.refresh()
            self._has_shown = True

    def image(self, name: str, step: int, image: Tensor) -> None:
        """Show an image, uint8 (3, H, W), in TensorBoard and W&B."""
        if self._active:
            with self.tolerate_failure("an image for TensorBoard or W&B"):
                for writer in self._writers:
                    writer.add_image(name, image, step)

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._active:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close the bar and the other writers."""
        if self._active:
            self._bar.close()
            for writer in self._writers:
                writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; lines that a crash has cut are left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [row for line in lines[:-1] if (row := _row(line)) is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _append(path: Path, text: str) -> None:
    """Append text, or nothing of it. Raises: OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def forget_after(path: Path, step: int) -> None:
    """Keep of a metrics.jsonl what was known at the checkpoint of `step`: the validation after it
    is made again. Lines that a crash has cut go too.
    """
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] < step + ("loss" in row)]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if not path.exists() or path.read_bytes() == text.encode():
        return
    write_text(path, text)


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


class WandbWriter:
    """Speaks like TensorBoard's SummaryWriter, so that the tracker need not know which it has.

    A resumed run goes on in the same W&B run, whose id is made from the output folder.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any] | None = None) -> None:
        import wandb

        self._wandb: Any = wandb
        name = str(folder.absolute())
        self._run = wandb.init(
            project=project,
            dir=str(folder),
            name=folder.name,
            id=hashlib.blake2b(name.encode(), digest_size=8).hexdigest(),
            resume="allow",
            config=config or {},
        )
        # Validations come after later steps' rows; W&B's own counter would drop them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Note one number."""
        self._run.log({name: value, "step": step})

    def add_image(self, name: str, image: Tensor, step: int) -> None:
        """Note an image, uint8 (3, H, W)."""
        pixels = image.permute(1, 2, 0).numpy()
        self._run.log({name: self._wandb.Image(pixels), "step": step})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


ENVIRONMENT = "environment.json"
_PACKAGES = ("latentdiff", "torch", "diffusers", "transformers", "accelerate", "safetensors")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, machine and processes as JSON values."""
    device = accelerator.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": gpu or str(device),
        "processes": accelerator.num_processes,
        "distribution": str(accelerator.distributed_type).rpartition(".")[2],
        "precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": _commit(),
        **{name: _version(name) for name in _PACKAGES},
    }


def write_environment(folder: Path, facts: dict[str, Any]) -> None:
    """Add this start of the run to OUTPUT/environment.json, a list of all of them."""
    file = folder / ENVIRONMENT
    text = json.dumps([*read_environment(folder), facts], indent=2) + "\n"
    write_text(file, text)


def read_environment(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, the first one first; empty if there is no record.

    Raises: UserError: it is damaged.
    """
    file = folder / ENVIRONMENT
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(start, dict) for start in found):
        raise UserError(f"{file} is damaged: it is no list of a run's starts. Move it away.")
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, marked if it was changed; None outside a repository."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    here, quiet = Path(__file__).parent, subprocess.DEVNULL
    try:
        found = subprocess.check_output(words, cwd=here, stderr=quiet, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.strip() or None


MEBI = 2**20


class Gauges:
    """Reads the machine; the counting and measuring was done before.

    Args:
        device: where the model is.
        flops_per_image: forward and backward.
        peak: floating-point operations per second of all processes' devices together.
    """

    def __init__(self, device: torch.device, flops_per_image: float, peak: float) -> None:
        self._device, self._flops, self._peak = device, flops_per_image, peak

    def __call__(self, images_per_second: float) -> dict[str, float]:
        """Return `mfu` (0 … 1) and `peak_memory_mb` (of this process since its start)."""
        return {
            "mfu": round(images_per_second * self._flops / self._peak, 4),
            "peak_memory_mb": round(peak_memory(self._device) / MEBI, 1),
        }


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def make_gauges(
    components: Components, latents: Latents, accelerator: Accelerator, frozen: bool = False
) -> Gauges:
    """Count the U-Net's FLOPs and find the machine's, once.

    Args:    frozen: the U-Net's own weights get no gradient.
    """
    channels, height, width = latents.data.shape
    tokens = components.text_encoder.max_length
    flops = count_flops(components.unet, (channels // 2, height, width), tokens, frozen)
    peak = peak_flops(accelerator.device, accelerator.mixed_precision)
    return Gauges(accelerator.device, flops, peak * accelerator.num_processes)


#: Dense peak in TFLOP/s by name: 16 bit with tensor cores, and 32 bit without.
PEAKS: dict[str, tuple[float, float]] = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 31.2),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def count_flops(
    unet: UNet, latent_shape: tuple[int, ...], tokens: int, frozen: bool = False
) -> int:
    """FLOPs of the forward and backward pass for one image.

    Args:   latent_shape: (C, h, w).  tokens: positions of the context.
            frozen: gradients pass through the weights, and the weights themselves get none.
    """
    with torch.device("meta"):
        twin = UNet(unet.config).requires_grad_(not frozen)
        x_t = torch.empty(1, unet.config.in_channels, *latent_shape[1:], requires_grad=frozen)
        context = torch.empty(1, tokens, unet.config.cross_attention_dim)
        t = torch.zeros(1)
    return count_module_flops(twin, x_t, t, context)


def count_module_flops(module: nn.Module, *inputs: Any) -> int:
    """FLOPs of module(*inputs), forward and backward, whatever device they are on."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs).sum().backward()
    return int(counter.get_total_flops())


def peak_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations per second that one device can do.

    Args:   precision: bf16, fp16 or no (32 bit).
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (half, single) in PEAKS.items():
            if known in name:
                return 1e12 * (single if precision == "no" else half)
    return measured_peak(device, precision)


def measured_peak(device: torch.device, precision: str, size: int | None = None) -> float:
    """The best of five matrix products of the given width."""
    width = size or (384 if device.type == "cpu" else 4096)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.ones(width, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * width**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
