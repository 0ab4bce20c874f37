"""Captioned images, learnt by heart through train_latent.py and generated from their captions."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from likeness import both_distances, nearest_is_own, own_share  # noqa: E402

from latentdiff.data.source import EXAMPLE  # noqa: E402
from latentdiff.embedded import EMBEDDED_MODEL  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (EMBEDDED_MODEL / "vae" / "config.json").is_file(), reason="no embedded autoencoder here"
)
SCRIPT = str(ROOT / "training" / "train_latent.py")
CONFIG = str(ROOT / "training" / "configs" / "overfit8.yaml")


def learn(output: Path, *overrides: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train, generate each caption, and compare with all originals.

    Returns: distances (made, original) by name; the same for originals through the autoencoder,
             which is the best that any model of its latents can do.
    """
    from latentdiff.data.images import to_tensor
    from latentdiff.data.source import open_source
    from latentdiff.images import to_output
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.train.config import read_config

    given = [f"output={output}", f"latents.cache_dir={output.parent / 'cache'}", *overrides]
    # A process of its own: Accelerate's precision is settled once per process.
    subprocess.run([sys.executable, SCRIPT, "--config", CONFIG, *given], check=True)
    data = read_config(Path(CONFIG), given).config.data
    source = open_source(data)
    originals = torch.stack(
        [to_tensor(source[i].image, data.image_size) for i in range(len(source))]
    )
    captions = [source.captions(i)[0] for i in range(len(source))]
    pipeline = LatentDiffusionPipeline.from_pretrained(output / "model")
    made = pipeline(captions, guidance_scale=1.0, num_inference_steps=25, seed=7).images
    with torch.no_grad():
        autoencoder = pipeline.components.autoencoder
        rebuilt = to_output(autoencoder.decode(autoencoder.encode(originals)), "pil")
    images = to_output(originals, "pil")
    return both_distances(made, images), both_distances(rebuilt, images)


def report(found: dict[str, Tensor], best: dict[str, Tensor]) -> None:
    for name, matrix in found.items():
        share, limit = own_share(matrix), own_share(best[name])
        print(
            f"{name}: {nearest_is_own(matrix)} of {len(matrix)} are nearest to their own, at "
            f"{share.mean():.2f} (worst {share.max():.2f}) of the mean distance to the others; "
            f"originals through the autoencoder {limit.mean():.2f} (worst {limit.max():.2f})"
        )


def check_with_the_embedded_autoencoder(output: Path, *overrides: str) -> None:
    found, best = learn(output, *overrides)
    report(found, best)
    for name, matrix in found.items():
        assert nearest_is_own(matrix) == len(matrix), name
        # What a classifier sees in a 64-pixel round trip is already far from the original.
        assert bool((own_share(matrix) < 0.5).all()) or name == "features"
        assert own_share(matrix).mean() < 1.15 * own_share(best[name]).mean() + 0.05, name


@pytest.mark.slow
def test_it_learns_two_images(tmp_path: Path) -> None:
    check_with_the_embedded_autoencoder(
        tmp_path / "run",
        f"data.path={two_of_the_example(tmp_path / 'images')}",
        "loop.max_steps=700",
        "loop.max_minutes=30",
        "loop.tensorboard=false",
    )


def two_of_the_example(folder: Path) -> Path:
    """Two drawings of examples/twemoji with .txt captions: a user's folder."""
    folder.mkdir()
    for name in ("owl", "teapot"):
        shutil.copy(EXAMPLE / f"{name}.webp", folder)
        (folder / f"{name}.txt").write_text(name)
    return folder


def eight_of(archive: Path, folder: Path) -> Path:
    """Eight images of a captioned zip, by a fixed seed, with .txt captions: a user's folder."""
    folder.mkdir()
    with zipfile.ZipFile(archive) as file:
        rows = [json.loads(line) for line in file.read("metadata.jsonl").splitlines()]
        for row in random.Random(3).sample(rows, 8):
            name = Path(row["file_name"]).name
            (folder / name).write_bytes(file.read(row["file_name"]))
            (folder / name).with_suffix(".txt").write_text(row["text"])
    return folder


@pytest.mark.slow
def test_it_learns_eight_images_of_a_folder_within_five_minutes(tmp_path: Path) -> None:
    assets = os.environ.get("LATENTDIFF_ASSETS")
    if not assets:
        pytest.skip("LATENTDIFF_ASSETS is not set: no captioned images and no TAESD here")
    images = eight_of(Path(assets) / "fluent_emoji_3d_128.zip", tmp_path / "images")
    found, best = learn(
        tmp_path / "run",
        f"data.path={images}",
        "data.image_size=128",
        f"model.vae={Path(assets) / 'taesd'}",
    )
    report(found, best)
    for name, matrix in found.items():
        assert nearest_is_own(matrix) == 8, name
        assert bool((own_share(matrix) < 0.5).all()), (name, own_share(matrix))
