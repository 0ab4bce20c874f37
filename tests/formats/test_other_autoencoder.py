"""`vae=`: an autoencoder from elsewhere for models that have none, or a bad one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.formats.identify import identify, refuse_unsupported
from latentdiff.formats.key_map import VAE_PREFIX
from latentdiff.formats.model import load_model, save_model
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.train.config import read_config
from latentdiff.train.parts import frozen_autoencoder, load_parts
from tests.random_models import make_pipeline, make_vae


@pytest.fixture(scope="module")
def wanted() -> Autoencoder:
    return Autoencoder(make_vae(seed=7))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with a bad autoencoder or none, as a folder and as a single file."""
    root = tmp_path_factory.mktemp("models")
    make_pipeline().save_pretrained(root / "bad")
    shutil.copytree(root / "bad", root / "none", ignore=shutil.ignore_patterns("vae"))
    save_model(root / "bad.safetensors", load_model(root / "bad"))
    from safetensors import safe_open

    with safe_open(root / "bad.safetensors", "pt") as file:
        metadata = file.metadata()
    rest = {k: t for k, t in load_file(root / "bad.safetensors").items() if VAE_PREFIX not in k}
    save_file(rest, root / "none.safetensors", metadata)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def sources(wanted: Autoencoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wanted autoencoder in every form that people have."""
    root = tmp_path_factory.mktemp("vae")
    theirs = wanted.module
    theirs.save_pretrained(root / "folder")
    pipeline = make_pipeline()
    pipeline.vae = theirs
    pipeline.save_pretrained(root / "model")
    save_model(root / "model.safetensors", load_model(root / "model"))
    save_file(theirs.state_dict(), root / "diffusers.safetensors")
    whole = load_file(root / "model.safetensors")
    prefixed = {k: t for k, t in whole.items() if k.startswith(VAE_PREFIX)}
    stability = {k.removeprefix(VAE_PREFIX): t for k, t in prefixed.items()}
    assert (
        "decoder.mid.attn_1.q.weight" in stability
        and "decoder.up.0.block.0.conv1.bias" in stability
    )
    save_file(stability, root / "stability.safetensors")
    save_file(prefixed, root / "prefixed.safetensors")
    extra = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    torch.save({"state_dict": stability | extra, "global_step": 3}, root / "a.vae.pt")
    return {path.name: path for path in root.iterdir()}


SOURCES = ("folder", "model", "model.safetensors", "diffusers.safetensors",
           "stability.safetensors", "prefixed.safetensors", "a.vae.pt")  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("model", ["bad", "bad.safetensors", "none.safetensors"])
def test_the_given_one_takes_the_place_of_the_model_s(
    models: dict[str, Path],
    sources: dict[str, Path],
    wanted: Autoencoder,
    model: str,
    source: str,
    tmp_path: Path,
) -> None:
    parts = load_model(models[model], vae=sources[source])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = wanted.decode(latents)
    torch.testing.assert_close(parts.autoencoder.decode(latents), expected)
    if source == "a.vae.pt":
        again = load_model(save_model(tmp_path / model, parts))
        torch.testing.assert_close(again.autoencoder.decode(latents), expected)


@torch.no_grad()
@pytest.mark.parametrize("model", ["none", "none.safetensors"])
def test_a_model_without_one_is_trained_with_another(
    models: dict[str, Path], sources: dict[str, Path], wanted: Autoencoder, model: str
) -> None:
    source = "folder" if model == "none" else "a.vae.pt"
    given = read_config(None, [f"model.pretrained={models[model]}", f"model.vae={sources[source]}"])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    parts, config, _ = load_parts(given)
    alone, same = frozen_autoencoder(given)  # what the latent cache is made with
    assert config.data == same.data
    for autoencoder in (parts.autoencoder, alone):
        torch.testing.assert_close(autoencoder.decode(latents), wanted.decode(latents))


@torch.no_grad()
def test_a_folder_without_one_opens_with_a_folder_that_has_one(
    models: dict[str, Path], sources: dict[str, Path], wanted: Autoencoder
) -> None:
    with pytest.raises(UserError, match="vae missing"):
        load_model(models["none"])
    parts = load_model(models["none"], vae=sources["folder"])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts.autoencoder.decode(latents), wanted.decode(latents))


def test_stable_diffusion_without_one_is_told_apart() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    }
    assert identify(shapes | {VAE_PREFIX: ()}, {}).version == "1"
    with pytest.raises(UserError, match=r"1\.x without its autoencoder.*with vae= or --vae"):
        refuse_unsupported(identify(shapes, {}), "file")


def without(key: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t for k, t in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without("decoder.conv_in.bias", s), "1 missing: decoder.conv_in.bias"),
        (lambda s: s | {"other": torch.zeros(1)}, "1 unexpected: other"),
        (lambda s: s | {"decoder.conv_in.bias": torch.zeros(3)}, "1 of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    models: dict[str, Path], wanted: Autoencoder, change: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "odd.safetensors"
    save_file(change(dict(wanted.module.state_dict())), file)
    with pytest.raises(UserError, match=message):
        load_model(models["bad"], vae=file)
    with pytest.raises(UserError, match=r"no model at .*gone\.vae\.pt: this file does not exist"):
        load_model(models["bad"], vae=tmp_path / "gone.vae.pt")
