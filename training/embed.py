"""Put trained parts into the package, as the model that from_pretrained() gives without arguments.

    python training/embed.py [--autoencoder RUN] [--clip RUN] [--unet MODEL_FOLDER] [--text FOLDER]
        [--guidance SCALE]

Each part that is named replaces the embedded one; the others stay.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError, command
from latentdiff.files import atomic_file, read_json, whole_folder, write_json
from latentdiff.formats.folder import GENERATION
from latentdiff.models.clip_scorer import HEAD, IMAGE_TOWER, TEXT_TOWER


def replace(source: Path, target: Path) -> None:
    """Copy a folder over another one. Raises: UserError: when there is nothing to copy."""
    if not source.is_dir():
        raise UserError(f"{source} is not there. Has its training ended?")
    with whole_folder(target) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)


def embed_clip(run: Path, target: Path) -> None:
    """Take the text tower, the vocabulary and, as files of their own, the image tower and head."""
    from safetensors.torch import save_file
    from transformers.models.clip import CLIPModel, CLIPVisionModelWithProjection

    for part in ("text_encoder", "tokenizer"):
        replace(run / part, target / part)
    shutil.rmtree(target / TEXT_TOWER, ignore_errors=True)
    clip: Any = CLIPModel.from_pretrained(run / "clip")
    image = CLIPVisionModelWithProjection(clip.config.vision_config).half()
    image.vision_model.load_state_dict(clip.vision_model.state_dict())
    image.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    with whole_folder(target / IMAGE_TOWER) as new:
        image.save_pretrained(new)
    head = {
        "text_projection.weight": clip.text_projection.weight.half().contiguous(),
        "logit_scale": clip.logit_scale.half(),
    }
    with atomic_file(target / HEAD) as new:
        save_file({k: v.detach() for k, v in head.items()}, new)


def embed_unet(model: Path, target: Path) -> None:
    """Take a trained model's U-Net in small files, its schedule, its index and its settings."""
    from latentdiff.formats.folder import SMALL_SHARDS, load_components, save_components

    with tempfile.TemporaryDirectory() as folder:
        again = save_components(
            Path(folder) / "model", load_components(model), max_shard_bytes=SMALL_SHARDS
        )
        for part in ("unet", "scheduler"):
            replace(again / part, target / part)
        for file in ("model_index.json", GENERATION):
            if (again / file).is_file():
                shutil.copy(again / file, target)


def embed_text(run: Path, target: Path) -> None:
    """Take a text encoder in small files, and its vocabulary; the scorer keeps the old one."""
    from latentdiff.formats.folder import SMALL_SHARDS, save_text_encoder
    from latentdiff.models.clip_text import load_text_encoder

    tower = load_text_encoder(run / "text_encoder", run / "tokenizer")
    if not (target / TEXT_TOWER).exists():
        replace(target / "text_encoder", target / TEXT_TOWER)
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "text_encoder"
        save_text_encoder(tower, again, max_shard_bytes=SMALL_SHARDS)
        replace(again, target / "text_encoder")
    replace(run / "tokenizer", target / "tokenizer")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Copy what was asked for and print the sizes; see `errors.command` for exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--autoencoder", type=Path, help="a train_autoencoder.py output")
    parser.add_argument("--clip", type=Path, help="a train_clip.py output")
    parser.add_argument("--unet", type=Path, help="a train_latent.py OUTPUT/model")
    parser.add_argument("--text", type=Path, help="a folder with text_encoder/ and tokenizer/")
    parser.add_argument("--guidance", type=float, help="the scale of calls that give none")
    options = parser.parse_args(arguments)
    EMBEDDED_MODEL.mkdir(parents=True, exist_ok=True)
    if options.autoencoder:
        replace(options.autoencoder / "vae", EMBEDDED_MODEL / "vae")
    if options.clip:
        embed_clip(options.clip, EMBEDDED_MODEL)
    if options.unet:
        embed_unet(options.unet, EMBEDDED_MODEL)
    if options.text:
        embed_text(options.text, EMBEDDED_MODEL)
    if options.guidance is not None:
        file = EMBEDDED_MODEL / GENERATION
        own = read_json(file) if file.is_file() else {}
        write_json(file, own | {"guidance_scale": options.guidance})
    for file in sorted(EMBEDDED_MODEL.rglob("*.safetensors")):
        print(f"{file.stat().st_size / 1e6:7.2f} MB  {file.relative_to(EMBEDDED_MODEL)}")


if __name__ == "__main__":
    sys.exit(main())
