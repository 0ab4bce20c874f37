"""Fine-tuning methods by name."""

from __future__ import annotations

import pytest

from latentdiff.config import kinds_of, load_config, sections
from latentdiff.errors import UserError
from latentdiff.finetune.registry import METHODS, FinetuneConfig
from latentdiff.train.config import TrainConfig, check_given, deciding_facts, read_config


def test_every_configuration_has_its_method() -> None:
    assert [kind for config in sections(FinetuneConfig) for kind in kinds_of(config)] == [*METHODS]


def test_kind_chooses_and_says_what_there_is() -> None:
    config = load_config(TrainConfig, None, ["finetune.kind=lora", "finetune.rank=4"])
    assert config.finetune.kind == "lora"
    assert config.finetune.rank == 4
    with pytest.raises(UserError, match=r"finetune.kind: must be one of full, lora.*'lore'"):
        load_config(TrainConfig, None, ["finetune.kind=lore"])
    with pytest.raises(UserError, match=r"finetune.rank: unknown key"):
        load_config(TrainConfig, None, ["finetune.rank=4"])
    bad = ["finetune.kind=lora", "finetune.rank=0", "finetune.alpha=-1", "finetune.targets=[]"]
    with pytest.raises(UserError) as error:
        load_config(TrainConfig, None, bad)
    for words in ("rank must be at least 1", "alpha must be above 0", "targets must name"):
        assert words in str(error.value)


def test_lora_needs_a_model_to_add_to() -> None:
    with pytest.raises(UserError, match=r"model.pretrained"):
        check_given(read_config(None, ["finetune.kind=lora"]))
    with pytest.raises(UserError, match=r"power_ema.every=0"):
        more = ["model.pretrained=embedded", "power_ema.every=5"]
        check_given(read_config(None, ["finetune.kind=lora", *more]))


def test_what_decides_the_numbers_of_a_method() -> None:
    facts = deciding_facts(load_config(TrainConfig, None, ["finetune.kind=lora"]))
    assert facts["finetune.kind"] == "lora"
    assert facts["finetune.rank"] == 8
    assert "finetune.fuse" not in facts
