"""Many processes fill one cache without speaking to each other; what is killed is made up for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import png, write_folder
from test_latent_cache import StubAutoencoder, config_of

from latentdiff.data import latents
from latentdiff.data.encoder import Encoder
from latentdiff.data.latents import (
    CacheBuilder,
    Done,
    LatentFolder,
    Shards,
    build_latent_cache,
    key_array,
    write_shard,
)
from latentdiff.data.source import DataConfig, open_source
from latentdiff.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COUNT = 23


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(latents, "SMALLEST_BLOCK", 4)  # six blocks
    return config_of(write_folder(tmp_path / "d", COUNT))


def work(
    config: DataConfig, cache: Path, rank: int, ranks: int, model: Any = None
) -> tuple[Done, bool]:
    """What one process does, and whether the cache is complete afterwards."""
    model = model or StubAutoencoder()
    folder = LatentFolder(cache, Encoder(model, config))
    encoding = CacheBuilder(open_source(config), folder, 4)
    done = encoding.run(rank, ranks, progress=False)
    return done, encoding.index() is not None


def test_processes_share_the_work_and_the_last_one_joins_it(
    config: DataConfig, tmp_path: Path
) -> None:
    results = [work(config, tmp_path / "c", rank, 3) for rank in (2, 0, 1)]
    assert [done.blocks for done, _ in results] == [2, 2, 2]
    assert sum(done.encoded for done, _ in results) == COUNT
    assert [complete for _, complete in results] == [False, False, True]
    model = StubAutoencoder()
    many = build_latent_cache(open_source(config), model, config, tmp_path / "c", progress=False)
    alone = build_latent_cache(
        open_source(config), StubAutoencoder(), config, tmp_path / "alone", progress=False
    )
    assert model.batches == []
    assert torch.equal(many.read(range(COUNT)).moments, alone.read(range(COUNT)).moments)
    assert many.fingerprint() == alone.fingerprint()
    assert not list((tmp_path / "c").glob("*/*block*"))


def test_a_dead_process_is_made_up_for_by_any_other_number(
    config: DataConfig, tmp_path: Path
) -> None:
    class Dies(StubAutoencoder):
        def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
            if len(self.batches) == 2:  # the probe and one batch
                raise KeyboardInterrupt
            return super().encode_moments(images)

    with pytest.raises(KeyboardInterrupt):
        work(config, tmp_path / "c", 0, 3, Dies())
    work(config, tmp_path / "c", 1, 3)
    work(config, tmp_path / "c", 2, 3)
    done, complete = work(config, tmp_path / "c", 0, 1)
    assert complete and done.encoded == 4  # its second block; the first one was committed
    again, complete = work(config, tmp_path / "c", 0, 5)
    assert complete and again == Done(0, 0)


def test_a_lost_part_is_encoded_again_and_nothing_else(config: DataConfig, tmp_path: Path) -> None:
    for rank in range(2):
        work(config, tmp_path / "c", rank, 2)
    parts = sorted((tmp_path / "c").glob("*/shard-*"))
    lost = len(Shards(parts[0].parent, (8, 4, 4))) - _rows(parts[1:], tmp_path)
    parts[0].unlink()
    done, complete = work(config, tmp_path / "c", 0, 1)
    assert complete and done.encoded == lost > 0


def _rows(parts: list[Path], tmp_path: Path) -> int:
    (tmp_path / "copy").mkdir()
    for part in parts:
        (tmp_path / "copy" / part.name).write_bytes(part.read_bytes())
    return len(Shards(tmp_path / "copy", (8, 4, 4)))


def test_unreadable_images_are_listed_once_in_their_order(
    config: DataConfig, tmp_path: Path
) -> None:
    assert config.path
    for number in (3, 17):
        (Path(config.path) / "images" / f"{number}.png").write_bytes(png(number)[:50])
    for rank in range(2):
        work(config, tmp_path / "c", rank, 2)
    cache = build_latent_cache(
        open_source(config), StubAutoencoder(), config, tmp_path / "c", progress=False
    )
    assert [name for name, _ in cache.skipped] == ["images/17.png", "images/3.png"]
    assert len(cache) == COUNT - 2


def test_keys_with_zero_bytes_are_kept_apart(tmp_path: Path) -> None:
    keys = [("00" * n + "ab" * (16 - n)) for n in range(17)]
    keys += ["ab" * n + "00" * (16 - n) for n in range(17)]
    keys = list(dict.fromkeys(keys))
    values = torch.arange(len(keys)).half()[:, None, None, None].expand(-1, 2, 2, 2)
    write_shard(tmp_path, keys, values)
    store = Shards(tmp_path, (2, 2, 2))
    order = np.random.default_rng(0).permutation(len(keys))
    read = store.read(store.rows(key_array([keys[i] for i in order])))
    assert read[:, 0, 0, 0].tolist() == order.tolist()
    assert "cd" * 16 not in store


def test_files_that_vanish_while_in_use_are_an_error_that_says_so(
    config: DataConfig, tmp_path: Path
) -> None:
    cache = build_latent_cache(
        open_source(config), StubAutoencoder(), config, tmp_path / "c", progress=False
    )
    for part in (tmp_path / "c").glob("*/shard-*"):
        part.unlink()
    with pytest.raises(UserError, match=r"lost .*Start again"):
        cache.read(range(COUNT))


def test_who_am_i(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    sys.path.insert(0, str(ROOT / "training"))
    from cache_latents import this_worker

    assert this_worker()[:2] == (2, 4)
    assert this_worker(0, 8)[:2] == (0, 8)
    for rank, ranks in ((1, None), (8, 8), (-1, 2)):
        with pytest.raises(UserError, match="--rank"):
            this_worker(rank, ranks)


def _command(folder: Path, *more: str) -> list[str]:
    script = str(ROOT / "training" / "cache_latents.py")
    own = ["data.kind=folder", f"data.path={folder / 'images'}", "data.image_size=16"]
    own += [f"model.vae={folder / 'parts'}", f"latents.cache_dir={folder / 'cache'}"]
    return [script, *own, *more]


KILLED = """
import os, runpy, signal, sys
from pathlib import Path

replace, shards = Path.replace, []

def killed(self, target):
    shards.append(target) if target.name.startswith("shard-") else None
    return replace(self, target) if len(shards) < 2 else os.kill(os.getpid(), signal.SIGKILL)

Path.replace = killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # kills itself between writing a second shard and giving it its name


@pytest.mark.slow
def test_the_script_under_accelerate_and_after_a_kill(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_training import make_images, make_parts

    make_parts(tmp_path / "parts")
    make_images(tmp_path / "images", 700)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    # One of two is killed while it stores its second block …
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *_command(tmp_path, "--rank", "0", "--ranks", "2")],
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cache").glob("*/shard-*"))) == 1
    assert list((tmp_path / "cache").glob("*/.tmp-*"))
    # … and two processes, started by accelerate, finish the work.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(ROOT / "training" / "accelerate" / "ddp_cpu_2.yaml")]
    run = subprocess.run(
        [*launcher, *_command(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "process 0 of 2" in run.stdout and "process 1 of 2" in run.stdout
    assert run.stdout.count("complete: 700 images") >= 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    again = subprocess.run(
        [sys.executable, *_command(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "all 700 images" in again.stdout and "nothing to do" in again.stdout
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert before == after
