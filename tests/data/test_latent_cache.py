"""Latents are encoded once: what is reused, what is not, and that nothing half-done counts."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import png, sample_image, write_folder
from torch import Tensor, nn

from latentdiff.data import latents
from latentdiff.data.images import to_tensor
from latentdiff.data.latents import LatentCache, Shards, build_latent_cache, key_array, write_shard
from latentdiff.data.source import DataConfig, Example, Source, open_source, split
from latentdiff.errors import UserError


class StubAutoencoder(nn.Module):
    """A strided convolution with the interface of the autoencoder; counts what it encodes."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.scale = scale
        self.batches: list[int] = []

    def encode_moments(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return self.conv(images) * self.scale


def config_of(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(kind="folder", path=str(folder), **{"image_size": 16, **options})


def build(
    config: DataConfig, cache_dir: Path, model: StubAutoencoder | None = None, **options: Any
) -> tuple[LatentCache, int]:
    """Build; also say how many images were encoded (the shape probe's one is not counted)."""
    model = model or StubAutoencoder()
    fresh = not list(cache_dir.glob("*/about.json"))
    before = sum(model.batches)
    source = options.pop("source", None) or open_source(config)
    cache = build_latent_cache(source, model, config, cache_dir, progress=False, **options)
    more = len(list(cache_dir.glob("*/about.json"))) > 1
    return cache, sum(model.batches) - before - (1 if fresh or more else 0)


def row(cache: LatentCache, index: int | list[int], place: int = 0) -> Tensor:
    """Moments of one entry, or of one of several that are read together."""
    return cache.read([index] if isinstance(index, int) else index).moments[place]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return config_of(write_folder(tmp_path / "d", 10))


def test_moments_are_the_encoders_in_fp16(config: DataConfig, tmp_path: Path) -> None:
    model = StubAutoencoder()
    cache, encoded = build(config, tmp_path / "c", model, batch_size=4)
    assert len(cache) == encoded == 10 and cache.shape == (8, 4, 4)
    assert model.batches == [1, 4, 4, 2]
    source = open_source(config)
    for i in (0, 3, 9):
        moments = row(cache, i)
        image = to_tensor(source[i].image, 16)[None]
        assert moments.dtype == torch.float16
        assert torch.allclose(moments.float(), model.conv(image)[0], atol=2e-3)
        assert (cache.captions(i), cache.name(i)) == ((f"image {i}",), f"images/{i}.png")
    assert torch.equal(row(cache, [7, 2, 7], 1), row(cache, 2))
    assert torch.equal(cache.read(torch.tensor([5])).moments[0], row(cache, 5))


def test_second_run_encodes_nothing(config: DataConfig, tmp_path: Path) -> None:
    first, _ = build(config, tmp_path / "c")
    model = StubAutoencoder()
    source = open_source(config)
    source._tree.read = None  # type: ignore[attr-defined]  # no file may be opened either
    second, _ = build(config, tmp_path / "c", model, source=source)
    assert model.batches == []
    assert torch.equal(first.read(range(10)).moments, second.read(range(10)).moments)
    assert first.fingerprint() == second.fingerprint()


def test_one_changed_image_is_one_new_row(config: DataConfig, tmp_path: Path) -> None:
    first, _ = build(config, tmp_path / "c")
    assert config.path
    (Path(config.path) / "images" / "4.png").write_bytes(png(99))
    second, encoded = build(config, tmp_path / "c")
    assert encoded == 1
    same = [torch.equal(row(first, i), row(second, i)) for i in range(10)]
    assert same == [i != 4 for i in range(10)]
    assert first.fingerprint() != second.fingerprint()


def test_moved_and_touched_files_are_not_encoded_again(config: DataConfig, tmp_path: Path) -> None:
    build(config, tmp_path / "c")
    assert config.path
    Path(config.path).rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "images" / "0.png").touch()
    assert build(config_of(tmp_path / "elsewhere"), tmp_path / "c")[1] == 0


def test_changed_captions_take_effect_without_encoding(config: DataConfig, tmp_path: Path) -> None:
    build(config, tmp_path / "c")
    assert config.path
    metadata = Path(config.path) / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"image ', '"photo '))
    cache, encoded = build(config, tmp_path / "c")
    assert encoded == 0 and cache.captions(3) == ("photo 3",)


@pytest.mark.parametrize("change", ["weights", "size", "crop", "background"])
def test_what_changes_the_moments_changes_the_key(
    config: DataConfig, tmp_path: Path, change: str
) -> None:
    build(config, tmp_path / "c")
    options: dict[str, Any] = {
        "size": {"image_size": 24}, "crop": {"crop": "pad"}, "background": {"background": (0, 0, 0)}
    }.get(change, {})  # fmt: skip
    model = StubAutoencoder(seed=1 if change == "weights" else 0)
    assert config.path
    assert build(config_of(Path(config.path), **options), tmp_path / "c", model)[1] == 10


def test_equal_images_are_encoded_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 6)
    for i in range(6):
        (folder / "images" / f"{i}.png").write_bytes(png(i % 2))
    cache, encoded = build(config_of(folder), tmp_path / "c", batch_size=1)
    assert (len(cache), encoded) == (6, 2)
    assert torch.equal(row(cache, 0), row(cache, 4)) and cache.captions(4) == ("image 4",)


def test_unreadable_images_are_skipped_by_name_and_batches_stay_full(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 10)
    broken = folder / "images" / "3.png"
    broken.write_bytes(png(3)[:60])
    (folder / "images" / "x.png").write_bytes(png(50))
    model = StubAutoencoder()
    cache, _ = build(config_of(folder), tmp_path / "c", model, batch_size=3)
    assert model.batches == [1, 3, 3, 3]
    assert len(cache) == 9 and 3 not in cache.source_indices
    assert [name for name, _ in cache.skipped] == ["images/x.png", "images/3.png"]
    assert broken.exists()
    again, _ = build(config_of(folder), tmp_path / "c", model)
    assert again.skipped == cache.skipped and len(again) == 9
    assert again.name(3) == "images/4.png"
    train, held_out = split(again, 0.5)
    assert sorted(train + held_out) == list(range(9))


def test_zero_usable_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 2)
    for i in range(2):
        (folder / "images" / f"{i}.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"0 usable images.*images/0\.png"):
        build(config_of(folder), tmp_path / "c")


class Rendered:
    """A source with no files: keys come from the pixels."""

    def __init__(self, count: int = 5) -> None:
        self.count, self.drawn, self.lock = count, 0, threading.Lock()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        with self.lock:
            self.drawn += 1
        return Example(sample_image(index), self.captions(index), self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"drawing {index}",)

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return f"rendered-{self.count}"


def test_sources_without_files(tmp_path: Path) -> None:
    source = Rendered()
    assert isinstance(source, Source)
    config = DataConfig(image_size=16)
    cache, encoded = build(config, tmp_path / "c", source=source)
    assert (len(cache), encoded, source.drawn) == (5, 5, 5)
    assert build(config, tmp_path / "c", source=source)[1] == 0 and source.drawn == 5
    assert build(config, tmp_path / "c", source=Rendered(7))[1] == 2


def test_a_killed_build_is_continued_and_never_taken_for_whole(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies(StubAutoencoder):
        def encode_moments(self, images: Tensor) -> Tensor:
            if len(self.batches) == 4:
                raise KeyboardInterrupt
            return super().encode_moments(images)

    monkeypatch.setattr(latents, "SHARD_BYTES", 2 * 8 * 4 * 4 * 2)  # two rows a shard
    with pytest.raises(KeyboardInterrupt):
        build(config, tmp_path / "c", Dies(), batch_size=2)
    folder = next((tmp_path / "c").glob("latents-*"))
    assert not list(folder.glob("index-*")) and len(list(folder.glob("shard-*"))) == 3
    assert not list(folder.glob(".tmp-*"))
    (folder / ".tmp-killed.safetensors").write_bytes(b"half a file")
    cache, encoded = build(config, tmp_path / "c", batch_size=2)
    assert encoded == 4
    whole, _ = build(config, tmp_path / "other")
    assert torch.equal(cache.read(range(10)).moments, whole.read(range(10)).moments)


def test_a_really_killed_process_leaves_no_shard(config: DataConfig, tmp_path: Path) -> None:
    code = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from latentdiff.data.latents import write_shard\n"
        "os.fsync = lambda descriptor: os._exit(9)\n"
        "write_shard(Path(sys.argv[1]), ['ab' * 16], torch.zeros(1, 8, 4, 4).half())\n"
    )
    (tmp_path / "s").mkdir()
    root = Path(latents.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], cwd=root, check=False)
    assert done.returncode == 9
    assert [p.name[:5] for p in (tmp_path / "s").iterdir()] == [".tmp-"]
    assert len(Shards(tmp_path / "s", (8, 4, 4))) == 0


def test_damaged_shards_and_indices_are_made_again(config: DataConfig, tmp_path: Path) -> None:
    first, _ = build(config, tmp_path / "c")
    folder = next((tmp_path / "c").glob("latents-*"))
    next(folder.glob("index-*")).write_text('{"keys": [')
    assert build(config, tmp_path / "c")[1] == 0
    about = (folder / "about.json").read_text()
    for text in ("", "[]", "{}", '{"moments_shape": 5}', '{"moments_shape": [8, 0, 4]}'):
        (folder / "about.json").write_text(text)
        assert build(config, tmp_path / "c")[1] == 1  # for the shape of the latents
        assert (folder / "about.json").read_text() == about
    shard, moments = next(folder.glob("shard-*")), first.read(range(10)).moments
    for damage in (b"not a shard", b"", shard.read_bytes()[:-1], shard.read_bytes()[:9]):
        shard.write_bytes(damage)
        second, encoded = build(config, tmp_path / "c")
        assert encoded == 10 and torch.equal(moments, second.read(range(10)).moments)
        shard = next(path for path in folder.glob("shard-*") if path != shard)
        for other in folder.glob("shard-*"):
            if other != shard:
                other.unlink()


def test_refusals(config: DataConfig, tmp_path: Path) -> None:
    assert config.path
    with pytest.raises(UserError, match="random cannot be cached"):
        build(config_of(Path(config.path), crop="random"), tmp_path / "c")
    with pytest.raises(UserError, match="not finite"):
        build(config, tmp_path / "c", StubAutoencoder(scale=1e9))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        build(config, tmp_path / "file")


def test_rows_are_found_in_any_order_across_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "OPEN_FILES", 3)  # of nine
    shape, count = (8, 4, 4), 250
    values, keys = torch.randn(count, *shape).half(), [f"{i:032x}" for i in range(count)]
    for start in range(0, count, 30):
        write_shard(tmp_path, keys[start : start + 30], values[start : start + 30])
    store = Shards(tmp_path, shape)
    assert len(store) == count and len(list(tmp_path.glob("shard-*"))) == 9
    order = np.random.default_rng(0).permutation(count)
    for batch in np.array_split(order, 7):
        assert torch.equal(store.read(store.rows(key_array(keys)[batch])), values[batch])


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    values = torch.randn(3, 8, 4, 4).half()
    write_shard(tmp_path, ["ab" * 16, "cd" * 16, "ef" * 16], values)
    found = load_file(next(tmp_path.glob("shard-*")))
    assert torch.equal(found["moments"], values)
    assert bytes(found["keys"][1].tolist()).hex() == "cd" * 16


def test_the_cache_needs_no_datasets_library(config: DataConfig, tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['datasets'] = sys.modules['pyarrow'] = None\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_latent_cache import build, config_of\n"
        "print(len(build(config_of(Path(sys.argv[1])), Path(sys.argv[2]))[0]))\n"
    )
    command = [sys.executable, "-c", code, str(config.path), str(tmp_path / "c")]
    root = Path(latents.__file__).parents[2]
    assert subprocess.run(command, cwd=root, check=True, capture_output=True).stdout == b"10\n"
