"""The model that comes with the package: its size, and what its parts can do."""

import sys
from pathlib import Path

import pytest
import torch

from latentdiff.data.source import DataConfig, open_source
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.evaluation.metrics import as_tensors, ranks, share_within
from latentdiff.evaluation.reference import Reference, open_reference

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "training"))


@pytest.fixture(scope="module")
def twemoji() -> Reference:
    """Drawings by an artist whom the model never saw."""
    return open_reference(DataConfig(), 200, 64)


def megabytes(*parts: str) -> float:
    files = (f for part in parts for f in (EMBEDDED_MODEL / part).rglob("*") if f.is_file())
    return sum(f.stat().st_size for f in files) / 1e6


def test_weights_are_small_and_sharded():
    assert megabytes("vae", "text_encoder", "tokenizer", "unet") <= 45
    assert megabytes("image_encoder", "clip_text_encoder") <= 7  # for scoring alone
    assert all(f.stat().st_size <= 15 * 2**20 for f in EMBEDDED_MODEL.rglob("*.safetensors"))


#: Of paper, as in the model's training images.
GROUNDS = [(255, 255, 255), (214, 62, 62), (245, 150, 50), (250, 222, 90), (92, 178, 96)]
GROUNDS += [(74, 134, 228), (150, 92, 198), (248, 168, 200), (28, 28, 32)]


def on_coloured_grounds(images: torch.Tensor) -> torch.Tensor:
    """White pixels of (B, 3, H, W) in the colours of GROUNDS in turn."""
    colours = torch.tensor(GROUNDS)[torch.arange(len(images)) % len(GROUNDS)] / 127.5 - 1
    return torch.where((images > 0.98).all(1, keepdim=True), colours[:, :, None, None], images)


def test_latents_are_standardised_with_the_scale_that_readers_assume(twemoji):
    from latentdiff.models.autoencoder import load_autoencoder

    vae = load_autoencoder(EMBEDDED_MODEL / "vae", torch.float32)
    assert vae.scale == pytest.approx(0.18215) and vae.shift == 0
    with torch.no_grad():
        latents = vae.encode(on_coloured_grounds(as_tensors(twemoji.images[:96])))
    assert latents.mean((0, 2, 3)).abs().max() < 0.35
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.25


def test_the_demo_asks_for_nothing_that_it_trains_on() -> None:
    from demo import COLUMNS, PROMPTS

    source = open_source(DataConfig())
    known = {text for index in range(len(source)) for text in source.captions(index)}
    assert len(source) == 200 and not known & {*PROMPTS} and len(set(PROMPTS)) == len(PROMPTS)
    assert len(PROMPTS) % COLUMNS == 0
    assert {"a birthday cake", "birthday cake", "bowling", "a t-rex"} <= known


@pytest.mark.slow
def test_autoencoder_keeps_drawings_of_an_artist_it_never_saw(twemoji):
    from latentdiff.models.autoencoder import load_autoencoder
    from latentdiff.train.autoencoder import psnr

    vae, images = (
        load_autoencoder(EMBEDDED_MODEL / "vae", torch.float32),
        as_tensors(twemoji.images),
    )
    with torch.no_grad():
        rebuilt = torch.cat([vae.decode(vae.encode(part)) for part in images.split(50)])
    decibels = float(psnr(rebuilt, images).mean())
    print(f"{decibels:.1f} dB")
    assert decibels >= 31


@pytest.mark.slow
def test_clip_finds_drawings_of_an_artist_it_never_saw_far_above_chance(twemoji):
    from latentdiff.models.clip_scorer import load_clip_scorer

    clip = load_clip_scorer(EMBEDDED_MODEL)
    images = clip.image_features(as_tensors(twemoji.images))
    texts = clip.text_features(twemoji.prompts)
    found = share_within(ranks(texts, images, twemoji.labels, range(len(texts))), 5)
    print(f"top-5 of 200: {found:.3f}")
    assert found >= 4 * 5 / 200
