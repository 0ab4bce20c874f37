"""Training goes past damaged files, says which it leaves out, and honours the doctor's list."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from damaged import snapshot, write_damaged, write_special
from test_doctor import check_damaged
from torch import Tensor, nn

from latentdiff.data.latents import LatentCache, build_latent_cache
from latentdiff.data.quarantine import read_quarantine, write_quarantine
from latentdiff.data.source import DataConfig, open_source, report_skipped

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]


class Stub(nn.Module):
    """A strided convolution in the place of an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 4, 4)

    def encode_moments(self, images: Tensor) -> Tensor:
        return self.conv(images)


def build(folder: Path, cache: Path, quarantine: str | None = None) -> LatentCache:
    config = DataConfig(kind="folder", path=str(folder), image_size=16, quarantine=quarantine)
    return build_latent_cache(open_source(config), Stub(), config, cache, progress=False)


def test_the_cache_holds_all_that_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    expected, special = write_damaged(folder, 100), write_special(folder)
    before = snapshot(folder)
    cache = build(folder, tmp_path / "cache")
    assert snapshot(folder) == before
    used, skipped = {cache.name(i) for i in range(len(cache))}, dict(cache.skipped)
    broken = {n for n, kinds in expected.items() if {"unreadable", "no-caption"} & set(kinds)}
    assert broken | set(special) <= set(skipped) and not used & set(skipped)
    assert {f"good-{n}.png" for n in range(5)} <= used
    assert used | set(skipped) >= {n for n, kinds in expected.items() if kinds != ("ignored",)}
    assert f"{len(skipped)} images are left out" in report_skipped(cache.skipped)

    listed = sorted(used)[:3] + sorted(skipped)[:3]
    write_quarantine(tmp_path / "q", [(name, "listed") for name in listed])
    less = build(folder, tmp_path / "cache", str(tmp_path / "q"))
    assert {less.name(i) for i in range(len(less))} == used - set(listed)
    assert {name for name, _ in less.skipped} == set(skipped) | set(listed)


@pytest.mark.slow
def test_doctor_and_trainer_against_a_thousand_damaged_files(tmp_path: Path, capsys) -> None:
    from tiny_training import arguments, losses, make_parts
    from train_latent import main

    folder, output = tmp_path / "data", tmp_path / "doctor"
    found = check_damaged(folder, output, 1000)
    assert sum("unreadable" in kinds for kinds in found.values()) > 250
    before, parts = snapshot(folder), make_parts(tmp_path / "parts")
    capsys.readouterr()
    for name, quarantine in (("plain", None), ("listed", output / "quarantine.jsonl")):
        more = [f"data.quarantine={quarantine}"] if quarantine else []
        run = tmp_path / name
        assert main(arguments(parts, folder, run, *more)) == 0
        assert "images are left out (no file was changed):" in capsys.readouterr().out
        assert len(losses(run)) == 6 and (run / "model" / "unet").is_dir()
    assert snapshot(folder) == before
    assert len(read_quarantine(output / "quarantine.jsonl")) > 400
