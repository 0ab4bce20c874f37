"""The training step as diffusers' examples/text_to_image/train_text_to_image.py does it.

Written from that script's documented behaviour, with its libraries (diffusers' networks, scheduler
and EMAModel, transformers' text tower, datasets' image folder, Accelerate): every step decodes,
resizes and crops its images, encodes them and their captions, draws noise, and takes the loss to
the host. `run_script` runs the real file instead.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PeerFlags:
    """The script's defaults, but for --use_ema, which the commands of its README set."""

    learning_rate: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 500
    gradient_accumulation_steps: int = 1
    dataloader_num_workers: int = 0
    center_crop: bool = False
    random_flip: bool = False
    gradient_checkpointing: bool = False
    use_8bit_adam: bool = False
    foreach_ema: bool = False
    use_ema: bool = True


class Peer:
    """Model, data and optimizer of the peer; `step` is one training step from images on disk."""

    def __init__(
        self, model: Path, images: Path, resolution: int, batch: int, accelerator: Any
    ) -> None:
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.flags, self.accelerator, self.resolution = PeerFlags(), accelerator, resolution
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.dtype = half.get(accelerator.mixed_precision, torch.float32)
        folder, device = str(model), accelerator.device
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        self.text_encoder = text.requires_grad_(False).to(device, self.dtype)
        self.vae = vae.requires_grad_(False).to(device, self.dtype)
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
        self.ema = EMAModel(unet.parameters(), foreach=self.flags.foreach_ema)
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=self.flags.learning_rate,
            betas=(self.flags.adam_beta1, self.flags.adam_beta2),
            weight_decay=self.flags.adam_weight_decay,
            eps=self.flags.adam_epsilon,
        )
        rate = get_scheduler(
            self.flags.lr_scheduler,
            optimizer,
            num_warmup_steps=self.flags.lr_warmup_steps,
            num_training_steps=10_000,
        )
        loader = self._loader(images, batch)
        self.unet, self.optimizer, self.loader, self.rate = accelerator.prepare(
            unet, optimizer, loader, rate
        )
        self.ema.to(device)
        self._batches = self._endless()

    def step(self) -> float:
        """One step with all that it does per step. Returns: the loss."""
        batch = next(self._batches)
        latents = self.vae.encode(batch["pixel_values"].to(self.dtype)).latent_dist.sample()
        latents = latents * self.vae.config.scaling_factor
        states = self.text_encoder(batch["input_ids"], return_dict=False)[0]
        return self.unet_step(latents, states)

    def unet_step(self, latents: Tensor, states: Tensor) -> float:
        """The part of the step that comes after the encoders."""
        noise = torch.randn_like(latents)
        levels = self.scheduler.config.num_train_timesteps
        t = torch.randint(0, levels, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, t)
        predicted = self.unet(noisy, t, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise.float())
        shown = self.accelerator.gather(loss.repeat(len(latents))).mean().item()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.unet.parameters(), self.flags.max_grad_norm)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        loss.detach().item()  # the progress bar's
        return float(shown)

    def _endless(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader

    def _loader(self, images: Path, batch: int) -> Any:
        from datasets import load_dataset
        from torch.utils.data import DataLoader

        data = load_dataset(
            "imagefolder",
            data_files={"train": str(images / "**")},
            cache_dir=str(images.parent / "peer-cache"),
        )["train"].with_transform(self._prepare)
        return DataLoader(
            data,
            batch_size=batch,
            shuffle=True,
            collate_fn=_stack,
            num_workers=self.flags.dataloader_num_workers,
        )

    def _prepare(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        ids = self.tokenizer(
            rows["text"],
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        pixels = [self._pixels(image.convert("RGB")) for image in rows["image"]]
        return {"pixel_values": pixels, "input_ids": list(ids)}

    def _pixels(self, image: Any) -> Tensor:
        import numpy as np
        from PIL.Image import Resampling

        side = self.resolution
        scale = side / min(image.size)
        width, height = (round(n * scale) for n in image.size)
        image = image.resize((width, height), Resampling.LANCZOS)
        left, top = (int(torch.randint(0, n - side + 1, (1,))) for n in (width, height))
        cropped = image.crop((left, top, left + side, top + side))
        tensor = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255
        return (tensor - 0.5) / 0.5


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in ("pixel_values", "input_ids")}


def script_command(
    script: Path, model: Path, images: Path, output: Path, steps: int, **given: Any
) -> list[str]:
    """The command that trains with the real script at its defaults and --use_ema."""
    fixed = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": images,
        "output_dir": output,
        "max_train_steps": steps,
        "report_to": "tensorboard",
        **given,
    }
    flags = [text for name, value in fixed.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(script), *flags, "--use_ema"]


def run_script(script: Path, model: Path, images: Path, steps: int, **given: Any) -> list[float]:
    """Seconds of each step of the real script, from the times in its TensorBoard file.

    The first two steps are left out: they allocate and warm up.
    Raises: SystemExit: something that the script needs is not installed, or it failed.
    """
    for package in ("torchvision", "tensorboard", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"--peer-script: the script needs {package}, which is not installed.")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as output:
        command = script_command(script, model, images, Path(output), steps + 3, **given)
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(f"--peer-script failed:\n{found.stderr[-2000:]}")
        for file in Path(output).rglob("events.out.tfevents*"):
            events = EventAccumulator(str(file.parent))
            events.Reload()
            if "train_loss" in events.Tags()["scalars"]:
                times = [event.wall_time for event in events.Scalars("train_loss")]
                return [after - before for before, after in pairwise(times[2:])]
    raise SystemExit("--peer-script: the script wrote no train_loss to TensorBoard.")
