"""Teach a text tower what things look like, before the U-Net is trained on it.

    python training/teach_drawing.py [--config FILE] [--resume] [a.b=value ...]

It ends with OUTPUT/text_encoder; U-Nets trained on the tower before do not fit it any more.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from latentdiff.command_line import command_line
from latentdiff.data.latent_cache import build_latent_cache
from latentdiff.data.source import open_source, split
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.formats.diffusers_folder import save_text_encoder
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.text_encoder import load_text_encoder
from latentdiff.trainer.drawing import DrawingConfig, DrawingLesson
from latentdiff.trainer.optimizer import OptimizerConfig, make_optimizer
from latentdiff.trainer.order import choose_caption
from latentdiff.trainer.output import default_cache
from latentdiff.trainer.processes import start_one_process
from latentdiff.trainer.stage import Stage, check_stage_output, sample_indices

CONFIG = Path(__file__).parent / "configs" / "drawing.yaml"


def train(config: DrawingConfig, resume: bool) -> None:
    """Encode the pictures, teach, write the tower."""
    stage_config, output = config.stage, Path(config.stage.output)
    accelerator = start_one_process(stage_config.mixed_precision)
    check_stage_output(stage_config, resume)
    torch.manual_seed(stage_config.seed)
    root = EMBEDDED_MODEL if config.model == "embedded" else Path(config.model)
    autoencoder = load_autoencoder(root / "vae")
    data = build_latent_cache(
        open_source(config.data), autoencoder, config.data, default_cache(), device="cpu"
    )
    train_rows, _ = split(data, config.data.validation_share, config.data.split_seed)
    tower = load_text_encoder(root / "text_encoder", root / "tokenizer")
    channels, height, width = data.shape
    tower.module.requires_grad_(True)
    lesson = DrawingLesson(tower, (channels // 2, height, width), config.patch)
    shape = OptimizerConfig(
        kind="muon",
        lr=stage_config.learning_rate,
        momentum=config.momentum,
        weight_decay=stage_config.weight_decay,
    )
    stage = Stage(
        {"lesson": lesson}, {"lesson": make_optimizer(lesson, shape)}, stage_config, accelerator
    )
    batch, seed = stage_config.batch_size, stage_config.seed
    for step in range(stage.resume(resume), stage_config.max_steps):
        places = sample_indices(step, len(train_rows), batch, seed).tolist()
        rows = [train_rows[i] for i in places]
        captions = [
            choose_caption(data.captions(row), seed, step * batch + i) for i, row in enumerate(rows)
        ]
        latents = autoencoder.latents_from_moments(data.moments_of(rows).float())
        stage.set_rate(step)
        with accelerator.autocast():
            error, moved = lesson(captions, latents)
        stage.step(["lesson"], error + config.keep_weight * moved)
        stage.log(step, {"error": error, "moved": moved})
        if (step + 1) % stage_config.checkpoint_every == 0 or step + 1 == stage_config.max_steps:
            stage.save(step + 1)
    save_text_encoder(tower, output / "text_encoder")
    print(f"text encoder written to {output}")


if __name__ == "__main__":
    try:
        train(*command_line(DrawingConfig, CONFIG, __doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
