"""A run's numbers and pictures in Weights & Biases, beside metrics.jsonl."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.errors import UserError


class WandbWriter:
    """Speaks like TensorBoard's SummaryWriter, so that the tracker need not know which it has.

    A resumed run goes on in the same W&B run, whose id is made from the output folder.
    Raises: UserError: wandb is not installed.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any] | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"loop.wandb={project} needs wandb, which cannot be imported ({error}). Install it "
                "with `pip install 'latentdiff[wandb]'`, or set loop.wandb=null."
            ) from error
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

    def add_image(self, name: str, picture: Tensor, step: int) -> None:
        """Note a picture, uint8 (3, H, W)."""
        pixels = picture.permute(1, 2, 0).numpy()
        self._run.log({name: self._wandb.Image(pixels), "step": step})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
