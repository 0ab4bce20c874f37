"""Measure the embedded autoencoder and CLIP on what their training never saw.

    python benchmarks/embedded_parts.py [--model FOLDER] [--output FILE.json]

Autoencoder: PSNR on concepts held out by name (skin tones merged), over the pixels where the
drawing is (alpha > 0). CLIP: a caption of a held-out composition (style or background of a known
concept) must find its picture among all concepts drawn the same way.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.emoji import (
    Drawing,
    EmojiSource,
    Rendering,
    captions_for,
    is_held_out,
    list_drawings,
    unit_hash,
)
from latentdiff.data.source import split
from latentdiff.data.transforms import to_tensor
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.models.autoencoder import Autoencoder, load_autoencoder
from latentdiff.models.clip_scorer import ClipScorer, load_clip_scorer
from latentdiff.trainer.autoencoder import psnr

SIZE = 64
#: (style, background) of the pictures that the two parts are measured on.
GROUNDS = [("plain", b) for b in ("white", "blue", "yellow", "black")]
STYLED = [("painting", "white"), ("pencil sketch", "white"), ("pixel art", "white")]
GALLERIES = [*STYLED, ("plain", "red"), ("plain", "blue"), ("plain", "black"), ("plain", "pink")]


def batches(source: EmojiSource, indices: list[int], size: int = 64) -> list[list[int]]:
    """Cut indices into batches."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


@torch.no_grad()
def reconstruction(vae: Autoencoder, drawings: list[Drawing], style: str, ground: str) -> Tensor:
    """PSNR over the drawing's pixels per held-out picture, in dB."""
    source = EmojiSource([Rendering(d, style, ground) for d in drawings], SIZE)
    _, held_out = split(source, 0.1, 0)
    found = []
    for part in batches(source, held_out):
        images = torch.stack([to_tensor(source[i].image, SIZE) for i in part])
        masks = np.stack([np.asarray(source.mask(i)) > 0 for i in part])
        rebuilt = vae.decode(vae.encode(images))
        found.append(psnr(rebuilt, images, torch.from_numpy(masks)[:, None].float()))
    return torch.cat(found)


@torch.no_grad()
def retrieval(clip: ClipScorer, drawings: list[Drawing], style: str, ground: str) -> list[int]:
    """Rank of the right picture (0 is first) for the caption of each held-out composition."""
    plain = [d for d in drawings if not d.tones]
    source = EmojiSource([Rendering(d, style, ground) for d in plain], SIZE)
    gallery = torch.cat(
        [
            clip.image_features(torch.stack([to_tensor(source[i].image, SIZE) for i in part]))
            for part in batches(source, list(range(len(source))))
        ]
    )
    asked = [i for i, d in enumerate(plain) if is_held_out(d.concept, style, ground)]
    texts = []
    for i in asked:
        captions = captions_for(source.renderings[i])
        texts.append(captions[int(unit_hash("query", i) * len(captions))])
    scores = clip.text_features(texts) @ gallery.T
    own = scores[torch.arange(len(asked)), asked][:, None]
    return (scores > own).sum(1).tolist()


def measure(folder: Path) -> dict[str, Any]:
    """Return every figure by name."""
    drawings = list_drawings()
    vae = load_autoencoder(folder / "vae", torch.float32)
    figures: dict[str, Any] = {}
    everything = []
    for style, ground in [*GROUNDS, *STYLED]:
        scores = reconstruction(vae, drawings, style, ground)
        everything += scores.tolist() if style == "plain" else []
        figures[f"psnr {style}/{ground}"] = round(float(scores.mean()), 2)
    figures["psnr plain, all grounds"] = round(float(np.mean(everything)), 2)
    figures["psnr pictures"] = len(everything)
    clip = load_clip_scorer(folder)
    ranks: list[int] = []
    for style, ground in GALLERIES:
        found = retrieval(clip, drawings, style, ground)
        figures[f"top-5 {style}/{ground}"] = round(float(np.mean(np.array(found) < 5)), 4)
        ranks += found
    figures["top-1 all"] = round(float(np.mean(np.array(ranks) < 1)), 4)
    figures["top-5 all"] = round(float(np.mean(np.array(ranks) < 5)), 4)
    figures["queries"] = len(ranks)
    figures["gallery"] = sum(not d.tones for d in drawings)
    return figures


def main() -> None:
    """Print the figures, and write them when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.model)
    for name, value in figures.items():
        print(f"{name:28} {value}")
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
