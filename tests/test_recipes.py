"""Every recipe of training/configs starts as it stands, in each precision that the machine has."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from tiny_training import make_images  # noqa: E402

from latentdiff.formats.embedding import read_embedding  # noqa: E402
from latentdiff.formats.folder import load_components  # noqa: E402
from latentdiff.formats.lora import read_lora  # noqa: E402
from latentdiff.models.autoencoder import load_autoencoder  # noqa: E402
from latentdiff.models.clip_text import load_text_encoder  # noqa: E402
from latentdiff.plain_yaml import read_yaml  # noqa: E402
from latentdiff.precision import has_fast_bf16  # noqa: E402

CONFIGS = ROOT / "training" / "configs"
#: Other ways to run some: from towers that exist with one of them frozen, a teacher, all in memory.
WAYS = {
    "clip+text": ["start=embedded", "freeze_image=true", "teacher_weight=2"],
    "clip+image": ["start=embedded", "freeze_text=true"],
    "autoencoder+memory": ["preload=true"],
}
RECIPES = sorted([*(p.stem for p in CONFIGS.glob("*.yaml")), *WAYS])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIXTEEN_BIT = ["bf16"] * has_fast_bf16(DEVICE) + ["fp16"] * torch.cuda.is_available()

LOOP = ["loop.max_steps=2", "loop.batch_size=2", "loop.log_every=1", "loop.tensorboard=false"]
LATENT = ["validation.images=1", "validation.prompts=[]", "validation.steps=1"]
LATENT += ["validation.samples=2"]


class Recipes:
    """Runs recipes, each once in each precision."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.run = functools.cache(self._run)

    def _run(self, recipe: str, precision: str) -> Path:
        """Train two steps; return the output folder."""
        kind, output = recipe.partition("+")[0], self._folder / f"{recipe}-{precision}"
        config = CONFIGS / f"{kind}.yaml"
        script = f"train_{kind}" if kind in ("autoencoder", "clip") else "train_latent"
        arguments = ["--config", str(config), *self._data(read_yaml(config)["data"])]
        arguments += [*LOOP, f"loop.mixed_precision={precision}", f"output={output}"]
        if script == "train_latent":
            arguments += [*LATENT, f"latents.cache_dir={self._folder / 'cache'}"]
        arguments += WAYS.get(recipe, [])
        if recipe == "clip+text":
            arguments.append(f"teacher={make_teacher(self._folder / 'teacher')}")
        assert importlib.import_module(script).main(arguments) == 0
        return output

    def _data(self, data: dict[str, Any]) -> list[str]:
        """Few images where the recipe names a folder; those of the repository as they are."""
        return [f"data.path={self._folder / 'images'}"] * ("path" in data)


def make_teacher(folder: Path) -> Path:
    """A sentence encoder of random weights."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers.models.bert import BertConfig, BertModel

    words = {word: n for n, word in enumerate(["[UNK]", "cat", "fox", "owl", "rocket", "photo"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def no_precision_is_left_behind() -> Iterator[None]:
    """Accelerate keeps that of the process's first Accelerator for those after it."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    folder = tmp_path_factory.mktemp("recipes")
    make_images(folder / "images", 8, size=64)
    return Recipes(folder)


def rows(output: Path) -> list[dict[str, Any]]:
    """The two steps."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "loss" in row]


def result(output: Path) -> dict[str, torch.Tensor]:
    """What a run has made, read from its file."""
    if (output / "model").is_dir():
        return dict(load_components(output / "model").unet.state_dict())
    if (output / "lora").is_dir():
        weights = read_lora(output / "lora").weights
        return {f"{n} up": change.up for n, change in weights.items()}
    if (output / "vae").is_dir():
        vae = load_autoencoder(output / "vae")
        state = dict(vae.module.state_dict())
        # The mean of the latents is subtracted here, divided by scale times their deviation.
        state["quant_conv.bias"] = state["quant_conv.bias"] * vae.scale
        return state
    if (output / "clip").is_dir():
        return load_text_encoder(output / "text_encoder", output / "tokenizer").weights()
    return {"word": read_embedding(output).vectors}


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_32_bit(recipe: str, recipes: Recipes) -> None:
    output = recipes.run(recipe, "no")
    assert [row["step"] for row in rows(output)] == [1, 2]
    assert all(bool(t.isfinite().all()) for t in result(output).values())


@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("recipe", RECIPES)
def test_in_16_bit_it_is_the_same_training(recipe: str, precision: str, recipes: Recipes) -> None:
    ours, whole = recipes.run(recipe, precision), recipes.run(recipe, "no")
    # Weights, images and noise of the first step are the same, so only rounding differs.
    assert rows(ours)[0]["loss"] == pytest.approx(rows(whole)[0]["loss"], rel=0.03, abs=1e-3)
    assert [row["step"] for row in rows(ours)] == [1, 2]
    mine, theirs = result(ours), result(whole)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0.02, atol=0.01)
    for one, other in zip(manifests(ours), manifests(whole), strict=True):
        # Layouts differ (channels last in 16 bit), the frozen weights do not.
        assert one["facts"].get("frozen weights") == other["facts"].get("frozen weights")


def manifests(output: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(output.glob("checkpoints/*/manifest.json"))]
