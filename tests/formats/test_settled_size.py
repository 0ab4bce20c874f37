"""The size of a version 2 file that does not say what it predicts is that of the measured kind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from latentdiff.formats import single_file as single_file
from latentdiff.models.tokenizer import clip_tokenizer, describe_tokenizer, tokenizer_of


@pytest.mark.parametrize(("measured", "side"), [("eps", 64), ("v", 96)])
@pytest.mark.parametrize("unstated", [True, False])
def test_latent_size(
    monkeypatch: pytest.MonkeyPatch, measured: str, side: int, unstated: bool
) -> None:
    opened = SimpleNamespace(
        is_measured=unstated,
        config={"unet": {"sample_size": 7}},
        networks={"unet": None},
        text_encoder=lambda dtype: None,
        state=lambda part: {},
    )
    monkeypatch.setattr(single_file, "read_tensor_file", lambda file: None)
    monkeypatch.setattr(single_file, "_parse", lambda file, **_: opened)
    monkeypatch.setattr(single_file, "fill_unet", lambda *_: None)
    monkeypatch.setattr(single_file, "measured_prediction", lambda *_: measured)
    found = single_file.latent_size_of_file(Path("x.safetensors"))
    assert found == (side if unstated else 7)


def test_a_tokenizers_own_length_is_kept() -> None:
    short = clip_tokenizer("!", 32)
    again = tokenizer_of(describe_tokenizer(short), 77)
    assert again.max_length == 32 and tokenizer_of(describe_tokenizer(short), 20).max_length == 20
    assert tokenizer_of({"clip": {"pad_token": "!"}}, 77).max_length == 77
