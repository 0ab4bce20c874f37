"""What a text tower that draws (teach_drawing.py) knows by itself, without a U-Net.

    python benchmarks/sketches.py [FOLDER] [--concepts 300] [--output PICTURE.png]

FOLDER holds text_encoder/ and tokenizer/; the default is the embedded model. A linear map from the
tower's last states to patches of the latents is fitted on the plain prompts of the other concepts;
what it makes of the prompts that the evaluation draws by its seed is decoded and recognised, as
inference/evaluate.py does. That is what cross-attention can get without learning pictures by heart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from latentdiff.data.emoji import Rendering
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError, exit_with
from latentdiff.evaluation.features import ClassifierFeatures
from latentdiff.evaluation.galleries import Galleries
from latentdiff.evaluation.measures import real_latents
from latentdiff.evaluation.prompts import concept_prompts, gallery_drawings, prompt_for
from latentdiff.evaluation.statistics import ranks, share_within
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.pipelines.pictures import grid, to_output
from latentdiff.trainer.drawing import patches
from latentdiff.trainer.output import default_cache
from latentdiff.trainer.unfolding import ridge

SIDE, PATCH = 64, 4


def states(text: TextEncoder, prompts: list[str], count: int) -> Tensor:
    """The last `count` states of every prompt, (N, count, width)."""
    parts = [text.encode(prompts[i : i + 64])[:, -count:] for i in range(0, len(prompts), 64)]
    return torch.cat(parts).float()


def joined(cut: Tensor, shape: torch.Size) -> Tensor:
    """The latents (N, C, h, w) that `patches` made these patches of."""
    count, channels, height, width = shape
    tiles = cut.view(count, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(shape)


@torch.no_grad()
def measure(folder: Path, concepts: int, output: Path | None) -> dict[str, float]:
    """Error and recognition of the sketches; a grid of the first 48 into `output`."""
    text = load_text_encoder(folder / "text_encoder", folder / "tokenizer")
    autoencoder = load_autoencoder(EMBEDDED_MODEL / "vae")
    drawings = gallery_drawings()
    asked = concept_prompts(drawings, concepts)
    taken = {one.row for one in asked}
    others = [Rendering(d, "plain", "white") for i, d in enumerate(drawings) if i not in taken]
    if not others:
        raise UserError(f"--concepts must leave some of {len(drawings)} to fit on; got {concepts}.")
    wanted = patches(real_latents(others, SIDE, autoencoder), PATCH)
    seen = states(text, [prompt_for(one) for one in others], wanted.shape[1])
    weight, offset = ridge(seen.flatten(0, 1), wanted.flatten(0, 1))
    clean = real_latents([one.rendering for one in asked], SIDE, autoencoder)
    said = states(text, [one.prompt for one in asked], wanted.shape[1]) @ weight.T + offset
    sketch = joined(said, clean.shape)
    images = [i for part in sketch.split(32) for i in to_output(autoencoder.decode(part), "pil")]
    features = ClassifierFeatures(torch.device("cpu"))
    gallery = Galleries(drawings, SIDE, features, default_cache() / "features", print)
    order = ranks(features(images), gallery("plain", "white"), [one.row for one in asked])
    if output is not None:
        grid(images[:48], 8).save(output)
    return {
        "mean squared error": float((sketch - clean).square().mean()),
        "concept top-1": share_within(order, 1),
        "concept top-5": share_within(order, 5),
    }


def main() -> None:
    """Measure and print."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", nargs="?", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--concepts", type=int, default=300, help="how many are drawn")
    parser.add_argument("--output", type=Path, help="PNG for the first sketches")
    given = parser.parse_args()
    for name, value in measure(given.folder, given.concepts, given.output).items():
        print(f"{name:20} {value:.4f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with(error)
