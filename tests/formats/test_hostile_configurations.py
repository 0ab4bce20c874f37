"""Configurations out of strangers' models: what no network has is refused before one is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff.errors import UserError
from latentdiff.formats.folder import load_components
from latentdiff.formats.identify import CONFIGURATION
from latentdiff.formats.model import load_model, save_model
from latentdiff.models.autoencoder import load_autoencoder
from tests.random_models import make_pipeline, make_vae

HUGE = 10**8
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
TOKENIZER, TINY = "tokenizer/tokenizer_config.json", "tiny/config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "field", "value", "words"),
    [
        (UNET, "layers_per_block", HUGE, r"layers_per_block must be whole numbers from 1 to"),
        (UNET, "layers_per_block", 10**6, r"asks for [\d,]+ layers .* at most 1,000"),
        (UNET, "transformer_layers_per_block", [600, 2], r"asks for [\d,]+ layers"),
        (UNET, "block_out_channels", [HUGE, HUGE], r"block_out_channels must be whole numbers"),
        (UNET, "block_out_channels", [16] * 1001, r"asks for 1,001 layers"),
        (UNET, "cross_attention_dim", 10**30, r"cross_attention_dim must be whole numbers"),
        (UNET, "cross_attention_dim", 16_000_000, r"of another shape"),
        (UNET, "cross_attention_dim", "24", r"cross_attention_dim must be whole number; got '24'"),
        (UNET, "attention_head_dim", -1, r"attention_head_dim must be whole numbers from 1"),
        (UNET, "sample_size", [16, 16, 16], r"sample_size must be"),
        (UNET, "sample_size", HUGE, r"sample_size must be whole numbers from 1 to"),
        (UNET, "dropout", float("nan"), r"dropout must be a number from 0\.0 to 1\.0; got nan"),
        (UNET, "use_linear_projection", "no", r"use_linear_projection must be true\|false"),
        (UNET, "freq_shift", 10**400, r"freq_shift must be a number from 0\.0 to 1\.0"),
        (VAE, "layers_per_block", HUGE, r"the autoencoder's layers_per_block must be"),
        (VAE, "block_out_channels", [8] * 1001, r"asks for 1,001 layers"),
        (TINY, "num_encoder_blocks", [HUGE] * 3, r"the autoencoder's num_encoder_blocks must be"),
        (TINY, "decoder_block_out_channels", [8] * 1001, r"asks for [\d,]+ layers"),
        (TINY, "act_fn", 3, r"describes no autoencoder"),
        (VAE, "scaling_factor", "x", r"scaling_factor must be a number"),
        (VAE, "latent_channels", 2**70, r"latent_channels must be whole numbers"),
        (TEXT, "num_hidden_layers", HUGE, r"num_hidden_layers must be whole numbers"),
        (TEXT, "num_hidden_layers", 10**5, r"asks for 100,000 layers"),
        (TEXT, "vocab_size", 10**20, r"vocab_size must be whole numbers"),
        (TEXT, "hidden_size", 0, r"hidden_size must be whole numbers from 1"),
        (TEXT, "layer_norm_eps", "x", r"layer_norm_eps must be a number"),
        (SCHEDULER, "num_train_timesteps", 10**12, r"num_train_timesteps must be a number from 2"),
        (SCHEDULER, "num_train_timesteps", None, r"num_train_timesteps must be a number"),
        (SCHEDULER, "beta_start", float("inf"), r"beta_start must be a number from 0 to 1"),
        (SCHEDULER, "beta_end", "x", r"beta_end must be a number from 0 to 1"),
        (SCHEDULER, "prediction_type", [], r"prediction_type must be text"),
        (SCHEDULER, "beta_schedule", {}, r"beta_schedule must be text"),
        (TOKENIZER, "model_max_length", "x", r"the tokenizer in .* cannot be read"),
    ],
)
def test_numbers_that_no_model_has(
    file: str, field: str, value: Any, words: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    if file == TINY:
        make_vae("tiny").save_pretrained(copy / "tiny")
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=words):
        load_autoencoder(copy / "tiny") if file == TINY else load_components(copy)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT, SCHEDULER, INDEX, TOKENIZER])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a":' * 50_000, "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[]", "must hold a JSON object; it holds a list"),
        ("3", "must hold a JSON object; it holds a int"),
        ("", "not valid JSON"),
    ],
    ids=["deep objects", "deep lists", "5,000 digits", "a list", "a number", "nothing"],
)
def test_text_that_is_no_object(
    file: str, text: str, words: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / file).write_text(text)
    with pytest.raises(UserError, match=f"{Path(file).name}.* {words}"):
        load_components(copy)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("unet", {"layers_per_block": HUGE}, "layers_per_block must be"),
        ("vae", {"block_out_channels": [HUGE]}, "block_out_channels must be"),
        ("text_encoder", {"num_hidden_layers": HUGE}, "num_hidden_layers must be"),
        ("scheduler", {"num_train_timesteps": 1e15}, "num_train_timesteps must be"),
        ("tokenizer", {"clip": []}, "describes no tokenizer"),
        ("tokenizer", {"clip": {"pad_token": "!", "added_tokens": 3}}, "describes no tokenizer"),
        ("generation", {"guidance_scale": "x"}, "guidance_scale .* must be a number"),
        ("unet", 3, "is damaged"),
        (None, '{"unet":' * 50_000, "not valid JSON"),
        (None, "[]", "must hold a JSON object"),
    ],
)
def test_a_configuration_in_metadata(
    part: str | None, value: Any, words: str, folder: Path, tmp_path: Path
) -> None:
    file = save_model(tmp_path / "model.safetensors", load_components(folder))
    with safe_open(file, "pt") as opened:
        meta = opened.metadata()
    config = json.loads(meta[CONFIGURATION])
    text = value if part is None else json.dumps(config | {part: value})
    save_file(load_file(file), file, meta | {CONFIGURATION: text})
    with pytest.raises(UserError, match=words):
        load_model(file)
