"""`auto` precision: bf16 only where the machine has it in hardware."""

import pytest
import torch

from latentdiff.precision import has_fast_bf16, resolve_precision


def cpu(monkeypatch: pytest.MonkeyPatch, *, avx512_bf16: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def test_a_cpu_without_bf16_instructions_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, avx512_bf16=False, amx=False)
    assert not has_fast_bf16("cpu")
    assert resolve_precision("auto", "cpu") == "no"


@pytest.mark.parametrize("which", ["avx512_bf16", "amx"])
def test_a_cpu_with_them_trains_in_bf16(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, avx512_bf16=which == "avx512_bf16", amx=which == "amx")
    assert resolve_precision("auto", "cpu") == "bf16"


@pytest.mark.parametrize("word", ["no", "bf16", "fp16"])
def test_what_is_asked_for_is_kept(word: str) -> None:
    assert resolve_precision(word, "cpu") == word
