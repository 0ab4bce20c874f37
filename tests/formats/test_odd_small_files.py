"""LoRA and embedding files whose contents make no sense: a UserError that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.cli import inspect as inspect
from latentdiff.errors import UserError
from latentdiff.formats.embedding import read_embedding
from latentdiff.formats.lora import read_lora

KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
NAME = "unet.mid_block.attentions.0.proj_in"
NAN, INF = float("nan"), float("inf")


def refused(file: Path, *words: str) -> None:
    """By reading and by `inspect`, which goes on to describe the rest."""
    with pytest.raises(UserError) as error:
        read_lora(file)
    for word in (str(file), *words):
        assert word in str(error.value), error.value
    found = dict(inspect.inspect(file))
    assert words[-1] in found["what"] and "--lora FILE" not in found["what"]
    assert found["layout"].startswith(("kohya", "diffusers"))


def poisoned(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.ones(shape)
    tensor[-1] = value
    return tensor.to(dtype)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": torch.ones(2)}, ("damaged", KOHYA, "not one real number")),
        ({"alpha": torch.ones((), dtype=torch.complex64)}, (KOHYA, "not one real number")),
        *[({"alpha": torch.tensor(a)}, ("alpha of " + KOHYA, f"{a:g}")) for a in (NAN, INF, -INF)],
        ({"alpha": torch.tensor(1e38)}, ("alpha of " + KOHYA, "1e+38")),
        ({"alpha": torch.tensor(-1e38)}, ("alpha of " + KOHYA, "-1e+38")),
        ({"lora_down.weight": torch.tensor(1.0)}, ("damaged", KOHYA, "()")),
        ({"lora_down.weight": torch.ones(2)}, (KOHYA, "(2,)")),
        ({"lora_down.weight": torch.ones(2, 4, 1)}, (KOHYA, "(2, 4, 1)")),
        (
            {"lora_down.weight": torch.ones(0, 4), "lora_up.weight": torch.ones(4, 0)},
            (KOHYA, "(0, 4) and (4, 0)"),
        ),
        ({"lora_up.weight": torch.ones(0, 2)}, (KOHYA, "(0, 2)")),
        ({"lora_up.weight": torch.ones(4, 3)}, ("(4, 3)", "differ in their rank")),
        ({"lora_up.weight": torch.ones(4, 2, dtype=torch.int8)}, (KOHYA, "torch.int8")),
        ({"lora_up.weight": poisoned((4, 2), NAN)}, (f"{KOHYA}.lora_up.weight", "not finite")),
        ({"lora_down.weight": poisoned((2, 4), INF)}, (f"{KOHYA}.lora_down.weight", "not finite")),
        (
            {"lora_down.weight": poisoned((2, 4), -INF, torch.float16)},
            (f"{KOHYA}.lora_down.weight", "not finite"),
        ),
        (
            {"lora_down.weight": poisoned((2, 4), NAN, torch.float8_e4m3fn)},
            (f"{KOHYA}.lora_down.weight", "not finite"),
        ),
        ({"dora_scale": poisoned((4, 1), NAN)}, (f"{KOHYA}.dora_scale", "not finite")),
        ({"diff_b": poisoned((4,), NAN)}, (f"{KOHYA}.diff_b", "not finite")),
        ({"diff": torch.ones(4, 4, dtype=torch.int64)}, (f"{KOHYA}.weight", "torch.int64")),
        ({"dora_scale": torch.ones(1, 3)}, (KOHYA, "per input channel")),
    ],
)
def test_lora(tmp_path: Path, change: dict[str, Tensor], words: tuple[str, ...]) -> None:
    tensors = {
        "lora_down.weight": torch.ones(2, 4),
        "lora_up.weight": torch.ones(4, 2),
        "alpha": torch.tensor(2),
    }
    file = tmp_path / "a.safetensors"
    save_file({f"{KOHYA}.{role}": tensor for role, tensor in tensors.items()}, file)
    assert read_lora(file).weights[KOHYA].scale == 1
    save_file({f"{KOHYA}.{role}": tensor for role, tensor in (tensors | change).items()}, file)
    refused(file, *words)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "must hold a JSON object"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"unet.lora_alpha": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"unet.lora_alpha": ' + "9" * 4000 + "}", "no number"),
        ('{"unet.lora_alpha": "much"}', "'much' is no number"),
        ('{"unet.lora_alpha": [1]}', "[1] is no number"),
        ('{"unet.lora_alpha": ' + "[" * 900 + "]" * 900 + "}", "no number"),
        ('{"unet.alpha_pattern": ' + "[" * 900 + "]" * 900 + "}", "no table"),
        ('{"unet.lora_alpha": NaN}', "alpha of " + NAME),
        ('{"unet.lora_alpha": 1e999}', "alpha of " + NAME),
        ('{"unet.lora_alpha": 1e38}', "1e+38"),
        ('{"unet.alpha_pattern": {"proj_in": Infinity}}', "alpha of " + NAME),
        ('{"unet.alpha_pattern": {"proj_in": null}}', "None is no number"),
        ('{"unet.alpha_pattern": ["proj_in"]}', "no table"),
        ('{"unet.alpha_pattern": {"(": 1}}', "no regular expression"),
        ('{"unet.alpha_pattern": {"(?=a)": 1}}', "regular expressions"),
    ],
    ids=lambda text: text[:40],
)
def test_settings_of_a_lora(tmp_path: Path, settings: str, word: str) -> None:
    tensors = {f"{NAME}.lora_A.weight": torch.ones(2, 4), f"{NAME}.lora_B.weight": torch.ones(4, 2)}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": "{}"})
    assert read_lora(file).weights[NAME].scale == 1
    save_file(tensors, file, {"lora_adapter_metadata": settings})
    refused(file, word)


def test_a_hostile_pattern_costs_no_time_and_the_next_one_counts(tmp_path: Path) -> None:
    tensors = {f"{NAME}.lora_A.weight": torch.ones(2, 4), f"{NAME}.lora_B.weight": torch.ones(4, 2)}
    # On this name a backtracking engine tries more than 2^40 ways, and then fails.
    patterns = {r"([\w.]|[a-z_.0])+" * 3 + "X": 99, "proj_in": 16}
    settings = {"unet.alpha_pattern": patterns, "unet.lora_alpha": 2}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)})
    assert read_lora(file).weights[NAME].scale == 8
    assert dict(inspect.inspect(file))["alpha"] == "16"


def test_a_key_that_repeats_another(tmp_path: Path) -> None:
    pair = {f"{NAME}.lora_A.weight": torch.ones(2, 4), f"{NAME}.lora_B.weight": torch.ones(4, 2)}
    save_file(pair | {f"{NAME}.lora_A.other.weight": torch.zeros(2, 4)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", f"{NAME}.lora_A", "repeat another")


def test_keys_that_are_no_texts(tmp_path: Path) -> None:
    torch.save({5: torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="no table of tensors"):
        read_lora(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "key", ["x" + ".lora_magnitude_vector" * 5000 + "!", "x" + ".hada_x" * 20_000 + "!"]
)
def test_long_keys_are_refused_at_once(tmp_path: Path, key: str) -> None:
    save_file({key: torch.ones(2), f"{NAME}.lora_A.weight": torch.ones(2, 4)}, tmp_path / "a.bin")
    (tmp_path / "a.bin").rename(tmp_path / "a.safetensors")
    for reader in (read_lora, inspect.inspect):
        with pytest.raises(UserError, match="at most 1,000"):
            reader(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"string_to_param": torch.ones(3)}, "textual inversion"),
        ({"<cat>": poisoned((2, 8), NAN)}, "<cat> has numbers that are not finite"),
        ({"<cat>": poisoned((8,), INF, torch.float16)}, "<cat> has numbers that are not finite"),
        ({"string_to_param": {"*": poisoned((1, 8), NAN)}, "name": "dog"}, "dog has numbers"),
        ({"<cat>": torch.ones(0, 8)}, "(0, 8)"),
        ({"<cat>": torch.ones(2, 0)}, "(2, 0)"),
        ({"<cat>": torch.ones(2, 2, 8)}, "(2, 2, 8)"),
        ({"<cat>": torch.ones(2, 8, dtype=torch.int32)}, "int32"),
        ({5: [1]}, "textual inversion"),
        ([torch.ones(8)], "list"),
    ],
)
def test_embedding(tmp_path: Path, content: Any, word: str) -> None:
    file = tmp_path / "a.pt"
    torch.save(content, file)
    with pytest.raises(UserError) as error:
        read_embedding(file)
    assert str(file) in str(error.value) and word in str(error.value)
