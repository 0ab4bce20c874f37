"""A model folder and captioned images that are small enough to train within seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from random_models import TEXT_WIDTH, make_text_model, make_vae, write_plain_vocabulary

NAMES = ("red", "green", "blue", "yellow", "purple", "orange", "grey", "black")
COLOURS = ((220, 40, 40), (40, 180, 60), (40, 80, 220), (230, 210, 50))
COLOURS += ((140, 50, 160), (240, 140, 30), (128, 128, 128), (10, 10, 10))

UNET = [
    "model.unet.block_out_channels=[16, 16]",
    "model.unet.down_block_types=[DownBlock2D, CrossAttnDownBlock2D]",
    "model.unet.up_block_types=[CrossAttnUpBlock2D, UpBlock2D]",
    "model.unet.norm_num_groups=8",
    "model.unet.attention_head_dim=2",
    f"model.unet.cross_attention_dim={TEXT_WIDTH}",
    "model.unet.sample_size=8",
]


def make_images(folder: Path, count: int = 8, size: int = 32) -> Path:
    """Write images with a .txt caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for i in range(count):
        pixels = np.full((size, size, 3), 255, np.uint8)
        top, left = noise.integers(0, size // 2, 2)
        pixels[top : top + size // 2, left : left + size // 2] = COLOURS[i % len(COLOURS)]
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {NAMES[i % len(NAMES)]} square {i}")
    return folder


def make_parts(folder: Path) -> Path:
    """Write a random autoencoder (f2, 4 latent channels) and text encoder."""
    make_vae().save_pretrained(folder / "vae")
    make_text_model().save_pretrained(folder / "text_encoder")
    write_plain_vocabulary(folder / "tokenizer")
    return folder


def arguments(parts: Path, images: Path, output: Path, *more: str) -> list[str]:
    """Overrides of a run that takes seconds: 32-pixel images, a U-Net of two levels."""
    return [
        *UNET,
        f"model.vae={parts}",
        f"model.text_encoder={parts}",
        "data.kind=folder",
        f"data.path={images}",
        "data.image_size=16",
        "data.validation_share=0",
        f"latents.cache_dir={output.parent / 'cache'}",
        "loop.mixed_precision=no",
        "loop.max_steps=6",
        "loop.batch_size=4",
        "loop.log_every=2",
        "loop.tensorboard=false",
        "validation.every=0",
        "validation.images=0",
        f"output={output}",
        *more,
    ]


def losses(output: Path) -> dict[int, float]:
    """Loss of every step in a run's metrics."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
