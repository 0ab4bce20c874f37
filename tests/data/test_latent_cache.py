"""Latents are encoded once: what is reused, what is not, and that nothing half-done counts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import picture, png, write_folder
from torch import Tensor, nn

from latentdiff.data import latent_store
from latentdiff.data.latent_cache import LatentCache, build_latent_cache
from latentdiff.data.latent_pack import LatentPack, write_pack
from latentdiff.data.source import DataConfig, Example, Source, open_source, split
from latentdiff.data.transforms import to_tensor
from latentdiff.errors import UserError

datasets = pytest.importorskip("datasets")


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
    """Build; also say how many pictures were encoded (the shape probe's one is not counted)."""
    model = model or StubAutoencoder()
    fresh = not list(cache_dir.glob("*/about.json"))
    before = sum(model.batches)
    source = options.pop("source", None) or open_source(config)
    cache = build_latent_cache(source, model, config, cache_dir, progress=False, **options)
    more = len(list(cache_dir.glob("*/about.json"))) > 1
    return cache, sum(model.batches) - before - (1 if fresh or more else 0)


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
        moments, captions, name = cache[i]
        image = to_tensor(source[i].image, 16)[None]
        assert moments.dtype == torch.float16
        assert torch.allclose(moments.float(), model.conv(image)[0], atol=2e-3)
        assert (captions, name) == ((f"picture {i}",), f"images/{i}.png")
    assert torch.equal(cache.moments_of([7, 2, 7])[1], cache[2][0])
    assert torch.equal(cache.moments_of(torch.tensor([5]))[0], cache[5][0])


def test_second_run_encodes_nothing(config: DataConfig, tmp_path: Path) -> None:
    first, _ = build(config, tmp_path / "c")
    model = StubAutoencoder()
    source = open_source(config)
    source._tree.read = None  # type: ignore[attr-defined]  # no file may be opened either
    second, _ = build(config, tmp_path / "c", model, source=source)
    assert model.batches == []
    assert torch.equal(first.moments_of(range(10)), second.moments_of(range(10)))
    assert first.fingerprint() == second.fingerprint()


def test_one_changed_picture_is_one_new_row(config: DataConfig, tmp_path: Path) -> None:
    first, _ = build(config, tmp_path / "c")
    assert config.path
    (Path(config.path) / "images" / "4.png").write_bytes(png(99))
    second, encoded = build(config, tmp_path / "c")
    assert encoded == 1
    same = [torch.equal(first[i][0], second[i][0]) for i in range(10)]
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
    metadata.write_text(metadata.read_text().replace("picture", "photo"))
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


def test_equal_pictures_are_encoded_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 6)
    for i in range(6):
        (folder / "images" / f"{i}.png").write_bytes(png(i % 2))
    cache, encoded = build(config_of(folder), tmp_path / "c", batch_size=1)
    assert (len(cache), encoded) == (6, 2)
    assert torch.equal(cache[0][0], cache[4][0]) and cache.captions(4) == ("picture 4",)


def test_unreadable_pictures_are_skipped_by_name_and_batches_stay_full(tmp_path: Path) -> None:
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


def test_zero_usable_pictures(tmp_path: Path) -> None:
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
        return Example(picture(index), self.captions(index), self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"drawing {index}",)

    def name(self, index: int) -> str:
        return str(index)

    def group(self, index: int) -> str:
        return str(index // 2)

    def fingerprint(self) -> str:
        return f"rendered-{self.count}"


def test_sources_without_files(tmp_path: Path) -> None:
    source = Rendered()
    assert isinstance(source, Source)
    config = DataConfig(image_size=16)
    cache, encoded = build(config, tmp_path / "c", source=source)
    assert (len(cache), encoded, source.drawn) == (5, 5, 5)
    assert cache.group(3) == "1"
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

    monkeypatch.setattr(latent_store, "PART_BYTES", 2 * 8 * 4 * 4 * 2)  # two rows a part
    with pytest.raises(KeyboardInterrupt):
        build(config, tmp_path / "c", Dies(), batch_size=2)
    folder = next((tmp_path / "c").glob("latents-*"))
    assert not list(folder.glob("index-*")) and len(list(folder.glob("part-*"))) == 3
    assert not list(folder.glob(".tmp-*"))
    (folder / ".tmp-killed.arrow").write_bytes(b"half a file")
    cache, encoded = build(config, tmp_path / "c", batch_size=2)
    assert encoded == 4
    whole, _ = build(config, tmp_path / "other")
    assert torch.equal(cache.moments_of(range(10)), whole.moments_of(range(10)))


def test_a_really_killed_process_leaves_no_part(config: DataConfig, tmp_path: Path) -> None:
    code = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from latentdiff.data.latent_store import LatentWriter\n"
        "with LatentWriter(Path(sys.argv[1]), (8, 4, 4)) as writer:\n"
        "    writer.append(['a', 'b'], torch.zeros(2, 8, 4, 4))\n"
        "    os._exit(9)\n"
    )
    (tmp_path / "s").mkdir()
    root = Path(latent_store.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], cwd=root, check=False)
    assert done.returncode == 9
    assert [p.name[:5] for p in (tmp_path / "s").iterdir()] == [".tmp-"]
    assert "a" not in latent_store.LatentStore(tmp_path / "s", (8, 4, 4))


def test_damaged_parts_and_indices_are_made_again(config: DataConfig, tmp_path: Path) -> None:
    first, _ = build(config, tmp_path / "c")
    folder = next((tmp_path / "c").glob("latents-*"))
    next(folder.glob("index-*")).write_text('{"keys": [')
    assert build(config, tmp_path / "c")[1] == 0
    part, moments = next(folder.glob("part-*")), first.moments_of(range(10))
    part.unlink()  # a new file under the same name: the old one is still mapped into memory
    part.write_bytes(b"not arrow")
    second, encoded = build(config, tmp_path / "c")
    assert encoded == 10 and torch.equal(moments, second.moments_of(range(10)))


def test_refusals(config: DataConfig, tmp_path: Path) -> None:
    assert config.path
    with pytest.raises(UserError, match="random cannot be cached"):
        build(config_of(Path(config.path), crop="random"), tmp_path / "c")
    with pytest.raises(UserError, match="not finite"):
        build(config, tmp_path / "c", StubAutoencoder(scale=1e9))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        build(config, tmp_path / "file")


def test_rows_are_found_in_any_order_across_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_store, "PART_BYTES", 2 * 8 * 4 * 4 * 30)
    monkeypatch.setattr(latent_store, "OPEN_FILES", 3)  # of about eight
    shape, count = (8, 4, 4), 250
    values = torch.randn(count, *shape)
    with latent_store.LatentWriter(tmp_path, shape) as writer:
        for start in range(0, count, 10):
            rows = range(start, start + 10)
            writer.append([str(i) for i in rows], values[start : start + 10])
    store = latent_store.LatentStore(tmp_path, shape)
    assert len(list(tmp_path.glob("part-*"))) == 9
    keys = latent_store.key_array(str(i) for i in range(count))
    order = np.random.default_rng(0).permutation(count)
    for batch in np.array_split(order, 7):
        assert torch.equal(store.read(store.rows(keys[batch])), values[batch].half())


def test_pack_reads_like_the_cache(config: DataConfig, tmp_path: Path) -> None:
    cache, _ = build(config, tmp_path / "c")
    write_pack(cache, tmp_path / "p" / "pack.safetensors")
    pack = LatentPack(tmp_path / "p" / "pack.safetensors")
    assert (len(pack), pack.shape, pack.fingerprint()) == (10, cache.shape, cache.fingerprint())
    assert torch.equal(pack.moments_of([3, 1, 3]), cache.moments_of([3, 1, 3]))
    for i in range(10):
        assert torch.equal(pack[i][0], cache[i][0]) and pack[i][1:] == cache[i][1:]
        assert pack.group(i) == cache.group(i)
    assert split(pack, 0.3) == split(cache, 0.3)
    write_pack(pack, tmp_path / "part.safetensors", [4, 2])
    assert LatentPack(tmp_path / "part.safetensors").name(1) == "images/2.png"


def test_pack_needs_no_datasets_library(config: DataConfig, tmp_path: Path) -> None:
    cache, _ = build(config, tmp_path / "c")
    write_pack(cache, tmp_path / "pack.safetensors")
    code = (
        "import sys\nsys.modules['datasets'] = None\n"
        "from latentdiff.data.latent_pack import LatentPack\n"
        "print(len(LatentPack(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pack.safetensors")]
    root = Path(latent_store.__file__).parents[2]
    assert subprocess.run(command, cwd=root, check=True, capture_output=True).stdout == b"10\n"


def test_what_is_no_pack(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="does not exist"):
        LatentPack(tmp_path / "none")
    (tmp_path / "a").write_text("x")
    save_file({"moments": torch.zeros(1, 2, 2, 2)}, tmp_path / "b")
    text = torch.tensor(list(json.dumps({"format": "other", "names": ["x"]}).encode())).byte()
    save_file({"moments": torch.zeros(1, 2, 2, 2), "text": text}, tmp_path / "c")
    for name in "abc":
        with pytest.raises(UserError, match="not a latent pack"):
            LatentPack(tmp_path / name)
