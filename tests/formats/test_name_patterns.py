"""Patterns of layer names: peft is the oracle of what they match, and none can take long."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from latentdiff.formats import name_patterns as name_patterns
from latentdiff.formats.lora import read_lora
from latentdiff.formats.name_patterns import NamePatterns

peft = pytest.importorskip("peft")
from peft.utils.other import get_pattern_key  # noqa: E402

NAMES = (
    "to_k",
    "mid.to_k",
    "mid.not_to_k",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "up_blocks.11.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "downxblocks.1.to_q",
)
#: Tables as people write them; the first pattern that matches counts.
TABLES = (
    {"to_k|to_v": 1},
    {"attn1.to_q": 1, "to_q": 2},
    {"to_q": 2, "attn1.to_q": 1},
    {"to": 1, "k": 2, "_k": 3},
    {"^to_k": 1, "mid.to_k$": 2},
    {r".*\.to_k": 1, r"down_blocks\..*\.to_q": 2},
    {r"down_blocks.*": 1},
    {r"down_blocks\.1\.(?:attentions|resnets)\.\d.*(to_q|to_v)": 1},
    {r"(up|down)_blocks\.\d+\.attentions\.[01]\..+": 1, "to_k": 3},
    {r"attn[^2]\.to_(q|out\.0)": 1, r"attn\w?.*": 2},
    {"down.blocks.1.to_q": 1, "(to_(k|v))?": 5},
    {r"[\w.]+attn[\d].to_[^\W]+": 1, r"[\w\-.]*0": 2},
    {re.escape(NAMES[3]): 1, NAMES[4]: 2},
    {"": 1, "to_k.*?": 2},
)


def assert_as_peft(table: dict[str, float], name: str) -> None:
    expected = table.get(get_pattern_key(table, name))
    assert NamePatterns(table).find([name]) == expected, (table, name)


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_what_people_write(table: dict[str, float]) -> None:
    for name in NAMES:
        assert_as_peft(table, name)


def test_what_nobody_writes() -> None:
    pieces = [
        "a",
        "b",
        ".",
        r"\.",
        "*",
        "+",
        "?",
        "(",
        "(?:",
        ")",
        "|",
        "[ab]",
        "[^a]",
        r"\w",
        "^",
        "$",
    ]
    dice, tried = random.Random(0), 0
    while tried < 400:
        pattern = "".join(dice.choices(pieces, k=dice.randint(1, 9)))
        try:
            NamePatterns({pattern: 1})
        except ValueError:
            continue
        tried += 1
        for name in ("a.to_k", "x.y.to_k", "ab.ba", "aab", "b", "a.b.a"):
            assert_as_peft({pattern: 1}, name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a pattern for another part
@pytest.mark.parametrize("stabilised", (False, True))
@pytest.mark.parametrize(
    ("path", "ends", "part"),
    [
        ("mid_block.attn1", ("to_q", "to_k", "to_v"), "unet"),
        ("text_model.encoder.layers.0.self_attn", ("q_proj", "k_proj"), "text_encoder"),
        ("encoder.layers.0.self_attn", ("q_proj", "k_proj"), "text_encoder"),
    ],
)
def test_every_layer_of_a_file_of_peft_is_as_strong_as_there(
    tmp_path: Path, path: str, ends: tuple[str, ...], part: str, stabilised: bool
) -> None:
    network = nn.ModuleDict({end: nn.Linear(4, 4) for end in ends})
    for name in reversed(path.split(".")):
        network = nn.ModuleDict({name: network})
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=list(ends),
        rank_pattern={f"{path}.{ends[0]}": 2},
        alpha_pattern={"to_k|to_v": 16, "(text_model.)?encoder.layers.0.self_attn.k_proj|x": 32},
        use_rslora=stabilised,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(network, settings)
    model.save_pretrained(tmp_path)
    found = read_lora(tmp_path).weights
    assert len(found) == len(ends)
    for name, layer in network.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            change = found[f"{part}.{name.removeprefix('text_model.')}"]
            torch.testing.assert_close(
                change.delta(torch.zeros(4, 4)), layer.get_delta_weight("default")
            )


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|a)*(a|a)*" * 5 + "b",
        "((a*)*)*b",
        "(a|aa)+" * 20 + "b",
        "(.*)*x",
        "a?" * 2000 + "b",
        "(" * 24 + "a|aa" + ")+" * 24,
    ],
)
def test_hostile_patterns_do_not_match_or_are_refused(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_patterns, "SECONDS", 0.1)
    # With backtracking each takes longer than the test session's limit, by orders of magnitude.
    try:
        assert NamePatterns({pattern: 1}).find(["a" * 60 + "c"]) is None
    except ValueError as error:
        assert "take too long" in str(error)


def test_a_table_has_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "SECONDS", 0.1)
    patterns = NamePatterns({"(a|aa)+" * 20 + "b": 1, "c": 2})
    for name in ("a" * 60, "c"):  # what was spent on a name is missing for the next
        with pytest.raises(ValueError, match="take too long"):
            patterns.find([name])


def test_many_plain_patterns_on_names_full_of_dots() -> None:
    patterns = NamePatterns({"." * 40 + str(i): i for i in range(1500)})
    for letter in "abcdefg":
        assert patterns.find([f"{letter}." * 500]) is None
        assert patterns.find([f"{letter}." * 500 + "y" * 40 + "1499"]) == 1499


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a)\1",
        "(?=a)a",
        "(?i)a",
        "a{4000000000}",
        "a*+b",
        "(" * 60 + "a" + ")" * 60,
        "a" * 20000,
        "(a",
        "*a",
        "[b-a]",
    ],
)
def test_what_is_not_supported_is_named(pattern: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(pattern)[:20])):
        NamePatterns({pattern: 1})
