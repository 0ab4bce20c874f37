"""Models and images of several sizes, on disk, for train_step.py to train on.

`small`, `medium` and `sd15` are one network, Stable Diffusion 1.5's, at an eighth, a quarter and
all of its widths and attention heads, with images of a quarter, half and all of its 512 pixels:
in each the autoencoder's encoder takes about the share of a training image's arithmetic that it
takes in SD 1.5, and heads have its sizes. medium and sd15 have as many attention scores per FLOP
too (at the finest level 38 per million; with all 8 heads medium would have 151).
The weights are random; speed does not depend on them. `embedded` is the model that comes
with the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.formats.folder import Components, load_components, save_components
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.clip_text import ClipText, TextEncoder
from latentdiff.models.tokenizer import load_tokenizer
from latentdiff.models.unet import UNet

TOKENS = 77
WORDS = ("red", "green", "small", "old", "cat", "house", "tree", "painting", "photo", "of", "a")


@dataclass(frozen=True)
class Size:
    """What is trained in one comparison."""

    divisor: int
    """Widths are SD 1.5's divided by this; 0 is the embedded model."""
    resolution: int
    """Side of the images."""
    batch: int
    """Images per step."""


SIZES = {
    "small": Size(8, 128, 4),
    "medium": Size(4, 256, 4),
    "sd15": Size(1, 512, 4),
    "embedded": Size(0, 64, 24),
}


def write_model(size: Size, folder: Path) -> Path:
    """Write the model as a Stable Diffusion folder that both sides read. Returns: the folder."""
    if size.divisor == 0:
        parts = load_components(EMBEDDED_MODEL)
    else:
        torch.manual_seed(0)
        parts = _sd15(size.divisor, size.resolution)
    # Noise prediction on SD 1.5's schedule: what the peer trains without further flags.
    parts.schedule, parts.prediction = ScheduleConfig(), "eps"
    return save_components(folder, parts, torch.float32)


def _sd15(divisor: int, resolution: int) -> Components:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    groups = 32 // divisor if divisor > 1 else 32
    unet = UNet.from_config(
        {
            "sample_size": resolution // 8,
            "block_out_channels": [n // divisor for n in (320, 640, 1280, 1280)],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "layers_per_block": 2,
            "norm_num_groups": groups,
            "attention_head_dim": 8 // divisor,  # heads of 40, 80 and 160 channels, as there
            "cross_attention_dim": 768 // divisor,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(n // divisor for n in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=min(groups, 128 // divisor),
        sample_size=resolution,
        scaling_factor=0.18215,
    )
    tokenizer = load_tokenizer(Path(EMBEDDED_MODEL) / "tokenizer", TOKENS)
    tokenizer.max_length = TOKENS
    vocabulary = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
    text = ClipText(
        {
            "vocab_size": vocabulary,
            "hidden_size": 768 // divisor,
            "intermediate_size": 3072 // divisor,
            "num_hidden_layers": 12,
            "num_attention_heads": max(1, 12 // divisor),
            "max_position_embeddings": TOKENS,
            "bos_token_id": tokenizer.backend.token_to_id("<|startoftext|>"),
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
        }
    )
    for name, weight in text.named_parameters():
        if "embedding" in name:  # empty memory so far: the tower is meant to be loaded
            torch.nn.init.normal_(weight, std=0.02)
    frozen = (m.eval().requires_grad_(False) for m in (vae, text))
    return Components(
        unet=unet,
        autoencoder=Autoencoder(next(frozen)),
        text_encoder=TextEncoder(next(frozen), tokenizer),
        schedule=ScheduleConfig(),
        prediction="eps",
    )


def write_images(folder: Path, count: int, side: int) -> Path:
    """Write JPEG images a quarter larger than `side`, and their captions. Returns: the folder."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        coarse = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side * 5 // 4,) * 2, Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}.jpg", quality=95)
        text = " ".join(noise.choice(WORDS, 9))
        rows.append({"file_name": f"{number:05d}.jpg", "text": f"{text} {number}"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder
