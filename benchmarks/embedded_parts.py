"""Measure the embedded autoencoder and CLIP on what their training never saw.

    python benchmarks/embedded_parts.py [--model FOLDER] [--output FILE.json]

Autoencoder: PSNR on concepts held out by name (skin tones merged), over the pixels where the
drawing is (alpha > 0). CLIP: the caption of a held-out composition (a style or background that a
known concept was never seen with) must find its picture among one picture of every concept; and,
harder, among all concepts drawn in that same style and on that same background.
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
    is_held_out,
    list_drawings,
    subject,
)
from latentdiff.data.emoji_captions import fixed_captions, unit_hash
from latentdiff.data.images import to_tensor
from latentdiff.data.source import split
from latentdiff.data.styles import BACKGROUNDS, STYLES
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.models.autoencoder import Autoencoder, load_autoencoder
from latentdiff.models.clip_scorer import ClipScorer, load_clip_scorer
from latentdiff.train.autoencoder import psnr

SIZE = 64
#: Share of the concepts that the autoencoder's training held out (autoencoder_gpu.yaml).
HELD_OUT = 0.02
#: (style, background) of the pictures that the two parts are measured on.
GROUNDS = [("plain", b) for b in ("white", "blue", "yellow", "black")]
STYLED = [("painting", "white"), ("pencil sketch", "white"), ("pixel art", "white")]
GALLERIES = [*STYLED, ("plain", "blue")]


def batches(source: EmojiSource, indices: list[int], size: int = 64) -> list[list[int]]:
    """Cut indices into batches."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


@torch.no_grad()
def reconstruction(vae: Autoencoder, drawings: list[Drawing], style: str, ground: str) -> Tensor:
    """PSNR over the drawing's pixels per held-out picture, in dB."""
    source = EmojiSource([Rendering(d, style, ground) for d in drawings], SIZE)
    _, held_out = split(source, HELD_OUT, 0)
    found = []
    for part in batches(source, held_out):
        images = torch.stack([to_tensor(source[i].image, SIZE) for i in part])
        masks = np.stack([np.asarray(source.mask(i)) > 0 for i in part])
        rebuilt = vae.decode(vae.encode(images))
        found.append(psnr(rebuilt, images, torch.from_numpy(masks)[:, None].float()))
    return torch.cat(found)


@torch.no_grad()
def ranks(clip: ClipScorer, gallery: list[Rendering], asked: list[int]) -> list[int]:
    """Rank of the right picture (0 is first) in the gallery, for one caption of each asked one."""
    source = EmojiSource(gallery, SIZE)
    features = torch.cat(
        [
            clip.image_features(torch.stack([to_tensor(source[i].image, SIZE) for i in part]))
            for part in batches(source, list(range(len(source))))
        ]
    )
    texts = []
    for i in asked:
        r = gallery[i]
        captions = fixed_captions(subject(r.drawing), r.style, r.background)
        texts.append(captions[int(unit_hash("query", gallery[i].drawing.concept) * len(captions))])
    scores = clip.text_features(texts) @ features.T
    own = scores[torch.arange(len(asked)), asked][:, None]
    return (scores > own).sum(1).tolist()


def one_of_each(drawings: list[Drawing]) -> tuple[list[Rendering], list[int]]:
    """One picture per concept, held out where it has any; and the indices of those."""
    every: dict[str, list[Rendering]] = {}
    for drawing in drawings:
        looks = [(s, b) for s in STYLES for b in BACKGROUNDS]
        held = [look for look in looks if is_held_out(drawing.concept, *look)]
        every[drawing.concept] = [Rendering(drawing, *look) for look in held or looks]
    gallery = [found[int(unit_hash("pick", name) * len(found))] for name, found in every.items()]
    asked = [
        i for i, r in enumerate(gallery) if is_held_out(r.drawing.concept, r.style, r.background)
    ]
    return gallery, asked


def share(found: list[int], top: int) -> float:
    """Share of ranks that are among the first `top`."""
    return round(float(np.mean(np.array(found) < top)), 4)


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
    plain = [d for d in drawings if not d.tones]
    gallery, asked = one_of_each(plain)
    found = ranks(clip, gallery, asked)
    figures |= {"gallery": len(gallery), "queries": len(asked)}
    figures |= {"top-1": share(found, 1), "top-5": share(found, 5)}
    for style, ground in GALLERIES:
        held = [i for i, d in enumerate(plain) if is_held_out(d.concept, style, ground)]
        found = ranks(clip, [Rendering(d, style, ground) for d in plain], held)
        figures[f"top-5 among {style}/{ground} only"] = share(found, 5)
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
        print(f"{name:36} {value}")
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
