"""Put trained parts into the package, as the model that from_pretrained() gives without arguments.

    python training/embed.py [--autoencoder RUN] [--clip RUN] [--unet MODEL_FOLDER] [--text RUN]

Each part that is named replaces the embedded one; the others stay.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.models.clip_scorer import HEAD, IMAGE_TOWER


def replace(source: Path, target: Path) -> None:
    """Copy a folder over another one. Raises: UserError: when there is nothing to copy."""
    if not source.is_dir():
        raise UserError(f"{source} is not there. Has its training ended?")
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def embed_clip(run: Path, target: Path) -> None:
    """Take the text tower, the vocabulary and, as files of their own, the image tower and head."""
    from safetensors.torch import save_file
    from transformers.models.clip import CLIPModel, CLIPVisionModelWithProjection

    for part in ("text_encoder", "tokenizer"):
        replace(run / part, target / part)
    clip: Any = CLIPModel.from_pretrained(run / "clip")
    image = CLIPVisionModelWithProjection(clip.config.vision_config).half()
    image.vision_model.load_state_dict(clip.vision_model.state_dict())
    image.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    image.save_pretrained(target / IMAGE_TOWER)
    head = {
        "text_projection.weight": clip.text_projection.weight.half().contiguous(),
        "logit_scale": clip.logit_scale.half(),
    }
    save_file({k: v.detach() for k, v in head.items()}, target / HEAD)


def embed_unet(model: Path, target: Path) -> None:
    """Take a trained model's U-Net in small files, its schedule and its index."""
    from latentdiff.formats.diffusers_folder import SMALL_SHARDS, load_components, save_components

    with tempfile.TemporaryDirectory() as folder:
        again = save_components(
            Path(folder) / "model", load_components(model), max_shard_bytes=SMALL_SHARDS
        )
        for part in ("unet", "scheduler"):
            replace(again / part, target / part)
        shutil.copy(again / "model_index.json", target)


def main() -> None:
    """Copy what was asked for and print the sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--autoencoder", type=Path, help="a train_autoencoder.py output")
    parser.add_argument("--clip", type=Path, help="a train_clip.py output")
    parser.add_argument("--unet", type=Path, help="a train_latent.py OUTPUT/model")
    parser.add_argument("--text", type=Path, help="a teach_words.py or teach_drawing.py output")
    arguments = parser.parse_args()
    EMBEDDED_MODEL.mkdir(parents=True, exist_ok=True)
    if arguments.autoencoder:
        replace(arguments.autoencoder / "vae", EMBEDDED_MODEL / "vae")
    if arguments.clip:
        embed_clip(arguments.clip, EMBEDDED_MODEL)
    if arguments.unet:
        embed_unet(arguments.unet, EMBEDDED_MODEL)
    if arguments.text:
        replace(arguments.text / "text_encoder", EMBEDDED_MODEL / "text_encoder")
        replace(arguments.text / "tokenizer", EMBEDDED_MODEL / "tokenizer")
        if (arguments.text / HEAD).is_file():  # teach_words.py leaves the end states where they are
            shutil.copy(arguments.text / HEAD, EMBEDDED_MODEL / HEAD)
    for file in sorted(EMBEDDED_MODEL.rglob("*.safetensors")):
        print(f"{file.stat().st_size / 1e6:7.2f} MB  {file.relative_to(EMBEDDED_MODEL)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
