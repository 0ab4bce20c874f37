"""What a train_latent.py run shows of its weights on the way: held-out loss and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.models.finite import NotFiniteError
from latentdiff.trainer.config import TrainConfig
from latentdiff.trainer.context import ContextCache
from latentdiff.trainer.ema import Ema
from latentdiff.trainer.open_data import Latents
from latentdiff.trainer.output import SAMPLES
from latentdiff.trainer.sharding import is_sharded
from latentdiff.trainer.tracking import Tracker
from latentdiff.trainer.validation import held_out_loss, picture_grid, pictures, write_png

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentdiff.formats.diffusers_folder import Components


class Validator:
    """Writes OUTPUT/samples/step-N.png (averaged weights), step-N-raw.png (the newest) and the
    held-out loss on the main process.

    The others wait, or compute along where the U-Net is sharded: a pass needs all shards.
    """

    def __init__(
        self,
        config: TrainConfig,
        components: Components,
        latents: Latents,
        context: ContextCache,
        ema: Ema,
        tracker: Tracker,
        accelerator: Accelerator,
        model: Any = None,
    ) -> None:
        self._config, self._parts, self._latents = config, components, latents
        self._model = components.unet if model is None else model
        self._context, self._ema, self._tracker = context, ema, tracker
        self._accelerator = accelerator
        self._schedule = NoiseSchedule(config.schedule)
        self._prompts = config.validation.prompts or self._captions(config.validation.pictures)

    def due(self, step: int) -> bool:
        """Whether to validate after so many steps (the end comes by itself)."""
        validation = self._config.validation
        if step == 0:
            return validation.at_start
        return bool(validation.every) and step % validation.every == 0

    def __call__(self, step: int) -> None:
        """Validate the averaged weights; the other processes wait."""
        unet = self._model
        if self._accelerator.is_main_process or is_sharded(unet):
            was_training = unet.training
            with self._ema.applied(), self._accelerator.autocast():
                unet.eval()
                self._loss(step)
                self._grid(step, "")
            if self._config.validation.raw:
                with self._accelerator.autocast():
                    self._grid(step, "-raw")
            unet.train(was_training)
        self._accelerator.wait_for_everyone()

    def _loss(self, step: int) -> None:
        if not self._latents.held_out:
            return
        loss = held_out_loss(
            self._model,
            self._parts.autoencoder,
            self._latents.data,
            self._latents.held_out,
            self._context,
            self._schedule,
            self._config.objective,
            self._config.validation.samples,
            self._config.loop.seed,
        )
        self._tracker.write([{"step": step, **loss.row()}])
        self._tracker.say(f"step {step}: validation loss {loss.mean:.4f}")

    def _grid(self, step: int, kind: str) -> None:
        if not self._prompts:
            return
        validation, (channels, height, width) = self._config.validation, self._latents.data.shape
        try:
            images = pictures(
                self._model,
                self._parts.autoencoder,
                self._context,
                self._schedule,
                self._config.objective.prediction,
                self._prompts,
                (channels // 2, height, width),
                steps=validation.steps,
                guidance=validation.guidance,
                seed=validation.seed,
            )
        except NotFiniteError as error:  # whether the run goes on is decided by its steps
            self._tracker.say(f"step {step}: no pictures: {error}")
            return
        grid = picture_grid(images)
        if self._accelerator.is_main_process:
            file = Path(self._config.output) / SAMPLES / f"step-{step:08d}{kind}.png"
            with self._tracker.going_on(str(file)):
                write_png(grid, file)
        self._tracker.image(f"samples{kind}", step, grid)

    def _captions(self, count: int) -> Sequence[str]:
        rows = self._latents.held_out or self._latents.train
        chosen = rows[:: max(1, len(rows) // max(1, count))][:count]
        return [self._latents.data.captions(row)[0] for row in chosen]
