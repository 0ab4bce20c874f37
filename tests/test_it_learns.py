"""Captioned pictures, learnt by heart through train_latent.py and generated from their captions."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from likeness import both_distances, nearest_is_own, own_share  # noqa: E402

from latentdiff.embedded import EMBEDDED_MODEL  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (EMBEDDED_MODEL / "vae" / "config.json").is_file(), reason="no embedded autoencoder here"
)
CONFIG = str(ROOT / "training" / "configs" / "overfit8.yaml")


def learn_and_compare(output: Path, *overrides: str) -> None:
    """Train, generate each caption, and compare with all originals."""
    from train_latent import main

    from latentdiff.data.source import open_source
    from latentdiff.pipelines.text_to_image import LatentDiffusionPipeline
    from latentdiff.trainer.config import read_config

    given = [f"output={output}", f"latents.cache_dir={output.parent / 'cache'}", *overrides]
    assert main(["--config", CONFIG, *given]) == 0
    source = open_source(read_config(Path(CONFIG), given).config.data)
    originals = [source[i].image for i in range(len(source))]
    captions = [source.captions(i)[0] for i in range(len(source))]
    pipeline = LatentDiffusionPipeline.from_pretrained(output / "model")
    made = pipeline(captions, guidance_scale=1.0, num_inference_steps=25, seed=7).images
    for name, matrix in both_distances(made, originals).items():
        share = own_share(matrix)
        print(
            f"{name}: {nearest_is_own(matrix)} of {len(matrix)} are nearest to their own, at ",
            end="",
        )
        print(f"{share.mean():.2f} (worst {share.max():.2f}) of the mean distance to the others")
        assert nearest_is_own(matrix) == len(originals), matrix
        assert bool((share < 0.5).all()), share


def test_it_learns_two_pictures(tmp_path: Path) -> None:
    learn_and_compare(
        tmp_path / "run",
        "data.emoji_concepts=[tomato, cat face]",
        "model.unet.block_out_channels=[32, 64, 64]",
        "model.unet.attention_head_dim=[1, 2, 2]",
        "loop.max_steps=250",
        "loop.max_minutes=2",
        "loop.tensorboard=false",
    )


@pytest.mark.slow
def test_it_learns_eight_pictures_within_five_minutes(tmp_path: Path) -> None:
    learn_and_compare(tmp_path / "run")
