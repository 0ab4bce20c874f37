"""What a run of train_latent.py says at its start and end."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentdiff.config import load_config
from latentdiff.errors import UserError
from latentdiff.finetune.full import Full, FullConfig
from latentdiff.finetune.lora import Lora
from latentdiff.train.config import TrainConfig
from latentdiff.train.latent_run import closing_message
from latentdiff.train.optimizer import OptimizerConfig, learning_rate, never_at_peak
from latentdiff.train.run import check_steps_left, planned_steps


@pytest.mark.parametrize("name", ["plain", "with space", "it's", "$HOME (1)"])
def test_the_command_it_ends_with_can_be_pasted(name: str) -> None:
    config = load_config(TrainConfig, None, [f"output=/runs/{name}", f"model.pretrained=/m/{name}"])
    parts: Any = SimpleNamespace(unet=None, text_encoder=SimpleNamespace(encode=None))
    whole = closing_message(config, [Path(f"/runs/{name}/model")], Full(parts, FullConfig()))
    assert shlex.split(whole.splitlines()[-1])[-2:] == ["--model", f"/runs/{name}/model"]
    lora: Any = SimpleNamespace(adds=True, usage=Lora.usage, example="a cat")
    words = shlex.split(closing_message(config, [Path("x")], lora).splitlines()[-1])
    file = f"/runs/{name}/lora/pytorch_lora_weights.safetensors"
    assert words[-4:] == ["--model", f"/m/{name}", "--lora", file]


def test_a_run_with_no_steps_left_says_so() -> None:
    assert check_steps_left(None, 5) == check_steps_left({"step": 4}, 5) == []
    assert "all loop.max_steps=5 steps have been made" in check_steps_left({"step": 5}, 5)[0]
    with pytest.raises(UserError, match=r"has made 6 steps, and loop\.max_steps=5 is less"):
        check_steps_left({"step": 6}, 5)


def test_a_longer_run_must_say_how_its_rate_goes_on() -> None:
    def planned(steps: int, **optimizer: Any) -> int | None:
        config = load_config(TrainConfig, None, [f"loop.max_steps={steps}"])
        config = replace(config, optimizer=OptimizerConfig(decay="cosine", **optimizer))
        return planned_steps({"facts": {"loop.max_steps": 5}}, config)

    assert planned(5) is planned(4) is None
    assert planned(9, extend="hold") == 5
    with pytest.raises(UserError, match=r"0 at step 5.*extend=restart .*, hold .* or decay"):
        planned(9)


def test_a_run_within_its_warm_up_says_what_rate_it_ends_at() -> None:
    config = OptimizerConfig(lr=3e-4, warmup_steps=200)
    (note,) = never_at_peak(config, 100)
    assert "rises to 0.00015 " in note and "optimizer.lr=0.0003" in note
    assert never_at_peak(config, 200) == []
    assert learning_rate(199, config, 200) == 3e-4
