"""What is labelled as Stable Diffusion has the shapes of it in every part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from latentdiff.cli import convert as convert
from latentdiff.formats.folder import Components, empty_unet
from latentdiff.formats.scheduler import read_scheduler
from latentdiff.formats.sd_facts import sd_configuration
from latentdiff.formats.single_file import modelspec, sd_differences, sd_version
from latentdiff.models.autoencoder import Autoencoder, empty_autoencoder
from latentdiff.models.clip_text import TextEncoder, empty_text_tower
from latentdiff.models.tokenizer import ClipTokenizer, clip_tokenizer
from latentdiff.models.unet_config import config_from_dict
from tests.random_models import make_vae

Changes = dict[str, Any]


def model(version: str, unet: Changes = {}, vae: Changes = {}, text: Changes = {}) -> Components:  # noqa: B006
    """A model of full size without weights, with some settings changed."""
    config = sd_configuration(version, "eps")
    schedule, prediction, sampling = read_scheduler(config["scheduler"])
    tower = empty_text_tower(config["text_encoder"] | text, "test")
    return Components(
        unet=empty_unet(config_from_dict(config["unet"] | unet)),
        autoencoder=Autoencoder(empty_autoencoder(config["vae"] | vae, "test")),
        text_encoder=TextEncoder(tower, clip_tokenizer("!")),
        schedule=schedule,
        prediction=prediction,
        sampling=sampling,
    )


@pytest.mark.parametrize("version", ["1", "2"])
def test_stable_diffusion_is_known_however_it_is_used(version: str) -> None:
    unet = {"sample_size": 96, "upcast_attention": True, "layers_per_block": [2, 2, 2, 2]}
    found = model(version, unet, {"sample_size": 768})
    assert sd_differences(found) == {} and sd_version(found) == version
    assert modelspec(found, "x")["modelspec.architecture"].startswith(
        f"stable-diffusion-v{version}"
    )


@pytest.mark.parametrize(
    ("changes", "part", "text"),
    [
        ({"text": {"vocab_size": 49409}}, "text encoder", "vocab_size 49409 instead of 49408"),
        ({"text": {"num_hidden_layers": 6}}, "text encoder", "num_hidden_layers 6 instead of 12"),
        ({"text": {"hidden_act": "gelu"}}, "text encoder", "hidden_act gelu instead of quick_gelu"),
        ({"vae": {"layers_per_block": 1}}, "autoencoder", "layers_per_block 1 instead of 2"),
        ({"vae": {"scaling_factor": 0.5}}, "autoencoder", "scaling_factor 0.5 instead of 0.18215"),
        ({"vae": {"shift_factor": 0.1}}, "autoencoder", "shift_factor 0.1 instead of 0.0"),
        ({"unet": {"use_linear_projection": True}}, "U-Net",
         "use_linear_projection True instead of False"),
        ({"unet": {"attention_head_dim": 4}}, "U-Net",
         "heads [4, 4, 4, 4] instead of [8, 8, 8, 8]"),
    ],
)  # fmt: skip
def test_one_other_part_is_enough_and_is_named(changes: Any, part: str, text: str) -> None:
    found = model("1", **changes)
    assert sd_differences(found) == {part: [text]} and sd_version(found) is None
    assert modelspec(found, "x")["modelspec.architecture"] == "latentdiff"


def test_another_autoencoder_or_vocabulary() -> None:
    whole = model("1")
    tiny = dataclasses.replace(whole, autoencoder=Autoencoder(make_vae("tiny")))
    assert "_class_name AutoencoderTiny" in sd_differences(tiny)["autoencoder"][0]
    whole.text_encoder.tokenizer = other_words(whole.text_encoder.tokenizer)
    assert sd_differences(whole) == {"tokenizer": ["another vocabulary than CLIP's"]}
    assert sd_version(whole) is None


def other_words(tokenizer: ClipTokenizer) -> Any:
    """As many words, in another order."""
    words: Callable[..., dict[str, int]] = tokenizer.backend.get_vocab
    turned = {word: (number + 1) % 49408 for word, number in words(True).items()}
    backend = SimpleNamespace(get_vocab=lambda **_: turned, to_str=lambda: "")
    return SimpleNamespace(backend=backend, config={}, max_length=77)


def test_convert_says_which_part_differs(tmp_path: Any) -> None:
    said = convert.report(tmp_path / "m.safetensors", model("1", text={"vocab_size": 49409}))
    assert "not of Stable Diffusion's size" in said
    assert "\n  text encoder: vocab_size 49409 instead of 49408" in said
    assert "note" not in convert.report(tmp_path / "m.safetensors", model("1"))
    assert "note" not in convert.report(tmp_path / "folder", model("1", text={"vocab_size": 9}))
