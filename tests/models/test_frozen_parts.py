"""Autoencoder, text encoder and tokenizer against diffusers and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.models.autoencoder import NO_VARIANCE, Autoencoder, load_autoencoder
from latentdiff.models.clip_text import TextEncoder, load_text_encoder
from latentdiff.models.tokenizer import load_tokenizer
from tests.random_models import (
    MAX_TOKENS,
    make_text_model,
    make_tokenizer,
    make_vae,
    write_plain_vocabulary,
)

IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
TEXTS = ["a cat", "", "Paint  the DOG's 12 tails!", "crème brûlée 🎉 日本", "x " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    make_vae().save_pretrained(root / "vae")
    make_vae("tiny").save_pretrained(root / "tiny")
    make_text_model().save_pretrained(root / "text_encoder")
    make_tokenizer().save_pretrained(root / "tokenizer")
    write_plain_vocabulary(root / "plain")
    return root


@pytest.fixture(scope="module")
def text_encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(folder / "text_encoder", folder / "tokenizer")


@torch.no_grad()
def test_kl_latents_are_scaled_once(folder: Path) -> None:
    theirs, ours = make_vae(), load_autoencoder(folder / "vae")
    assert (ours.latent_channels, ours.downscale) == (4, 2)
    posterior = theirs.encode(IMAGES).latent_dist
    moments = ours.encode_moments(IMAGES)
    torch.testing.assert_close(moments, posterior.parameters)
    eps = torch.randn(posterior.mean.shape)
    expected = (posterior.mean + posterior.std * eps) * theirs.config.scaling_factor
    torch.testing.assert_close(ours.latents_from_moments(moments, eps), expected)
    latents = ours.encode(IMAGES)
    torch.testing.assert_close(latents, posterior.mean * theirs.config.scaling_factor)
    decoded = theirs.decode(latents / theirs.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(ours.decode(latents), decoded)


@torch.no_grad()
def test_tiny_has_a_mean_and_no_variance(folder: Path) -> None:
    theirs, ours = make_vae("tiny"), load_autoencoder(folder / "tiny")
    assert (ours.latent_channels, ours.downscale) == (4, 4)
    moments = ours.encode_moments(IMAGES)
    mean, logvar = moments.chunk(2, dim=1)
    torch.testing.assert_close(mean, theirs.encode(IMAGES).latents)
    assert (logvar == NO_VARIANCE).all()
    drawn = ours.latents_from_moments(moments, torch.randn_like(mean))
    torch.testing.assert_close(drawn, mean, atol=1e-5, rtol=0)
    assert ours.decode(mean).abs().max() <= 1


@torch.no_grad()
def test_shift_and_scale_cancel() -> None:
    vae = make_vae()
    vae.register_to_config(shift_factor=0.3, scaling_factor=2.0)
    ours, raw = Autoencoder(vae), torch.randn(1, 4, 8, 8)
    latents = ours.latents_from_moments(torch.cat([raw, raw], dim=1))
    torch.testing.assert_close(latents, (raw - 0.3) * 2)
    torch.testing.assert_close(ours.decode(latents), vae.decode(raw).sample.clamp(-1, 1))


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("scale", [None, 0, 0.0])
def test_latents_have_a_scale(scale: float | None, kind: str, tmp_path: Path) -> None:
    make_vae(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"scaling_factor": scale}))
    with pytest.raises(UserError, match="scaling_factor"):
        load_autoencoder(tmp_path)
    del config["scaling_factor"]  # the class's default
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_autoencoder(tmp_path).scale == (0.18215 if kind == "kl" else 1.0)


def test_image_size_must_fit(folder: Path) -> None:
    ours = load_autoencoder(folder / "tiny")
    ours.check_image_size((16, 24))
    with pytest.raises(UserError, match=r"multiples of 4.*got 30\. The nearest is 32"):
        ours.check_image_size(30)
    with pytest.raises(UserError, match="multiples of 4"):
        ours.encode(torch.zeros(1, 3, 18, 16))


@torch.no_grad()
@pytest.mark.parametrize("tokenizer", ["tokenizer", "plain"])
def test_text_states_are_theirs(folder: Path, tokenizer: str) -> None:
    ours = load_text_encoder(folder / "text_encoder", folder / tokenizer)
    batch = make_tokenizer()(
        TEXTS, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    with pytest.warns(UserWarning, match="cut off"):
        assert torch.equal(ours.tokenizer(TEXTS), batch.input_ids)
    with pytest.warns(UserWarning, match="cut off"):
        states = ours.encode(TEXTS)
    assert states.shape == (len(TEXTS), ours.max_length, ours.width)
    expected = make_text_model()(batch.input_ids).last_hidden_state
    torch.testing.assert_close(states, expected)


def test_padding_token_is_read(folder: Path, tmp_path: Path) -> None:
    write_plain_vocabulary(tmp_path, pad_token="!")  # SD 2.x pads with "!"
    tokenizer = load_tokenizer(tmp_path, MAX_TOKENS)
    ids = tokenizer(["a"])[0]
    assert ids[-1] == tokenizer.backend.token_to_id("!") != tokenizer.end_id


def test_warning_names_the_words_cut(text_encoder: TextEncoder) -> None:
    assert text_encoder.count_tokens("a cat") == 4
    text = "cat " * 13 + "painting of a dog"
    with pytest.warns(UserWarning, match="takes 16 tokens.*cut off: 'painting of a dog'"):
        text_encoder.tokenizer([text])


def test_tokenizer_files_are_complete(text_encoder: TextEncoder, tmp_path: Path) -> None:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    text_encoder.tokenizer.save(tmp_path)
    names = {"tokenizer.json", "vocab.json", "merges.txt"}
    assert names | {"tokenizer_config.json", "special_tokens_map.json"} == {
        p.name for p in tmp_path.iterdir()
    }
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == MAX_TOKENS
    (tmp_path / "tokenizer.json").unlink()
    plain = load_tokenizer(tmp_path, 77)
    for text in TEXTS[:4]:
        wanted = text_encoder.tokenizer.backend.encode(text).ids
        assert plain.backend.encode(text).ids == theirs(text).input_ids == wanted


def test_missing_and_wrong_parts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no autoencoder at"):
        load_autoencoder(tmp_path)
    with pytest.raises(UserError, match="no text encoder at"):
        load_text_encoder(tmp_path, folder / "tokenizer")
    with pytest.raises(UserError, match="no tokenizer at"):
        load_text_encoder(folder / "text_encoder", tmp_path)
    with pytest.raises(UserError, match="must be a CLIPTextModel"):
        broken = shutil.copytree(folder / "text_encoder", tmp_path / "text")
        (broken / "config.json").write_text(json.dumps({"model_type": "t5"}))
        load_text_encoder(broken, folder / "tokenizer")
    with pytest.raises(UserError, match="must be one of AutoencoderKL, AutoencoderTiny"):
        broken = shutil.copytree(folder / "vae", tmp_path / "vae")
        (broken / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLL"}))
        load_autoencoder(broken)


def test_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        broken = shutil.copytree(folder / part, tmp_path / part)
        state = load_file(broken / f"{stem}.safetensors")
        state.pop(next(iter(state)))
        save_file(state, broken / f"{stem}.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 missing: "):
        load_autoencoder(tmp_path / "vae")
    with pytest.raises(UserError, match="1 missing: "):
        load_text_encoder(tmp_path / "text_encoder", folder / "tokenizer")
