"""Streams: every row once per epoch on exactly one process; an empty stream is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_helpers import png, write_folder
from test_latent_cache import StubAutoencoder

from latentdiff.data.online import OnlineLatents, StreamLatents
from latentdiff.data.source import DataConfig, open_source
from latentdiff.errors import UserError
from latentdiff.train.batches import StreamOrder, make_order

datasets = pytest.importorskip("datasets")
COUNT = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    for part in range(4):
        rows = range(part, COUNT, 4)
        table = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": png(n) if n != 5 else b"broken", "path": None} for n in rows],
                "text": [f"image {n}" if n != 6 else "" for n in rows],
            }
        )
        table.to_parquet(folder / f"train-{part}.parquet")
    return folder


def config(path: Path, /, **options: object) -> DataConfig:
    settings = {"path": str(path), "kind": "hub", "streaming": True, "image_size": 16, **options}
    return DataConfig(**settings)  # type: ignore[arg-type]


def taken(stream: StreamLatents, count: int, step: int = 0) -> list[str]:
    stream.take(range(count), step)
    return [stream.captions(n)[0] for n in range(count)]


def test_every_usable_row_comes_once_a_pass_and_processes_share_them(shards: Path) -> None:
    usable = sorted(f"image {n}" for n in range(COUNT) if n not in (5, 6))
    stream = StreamLatents(config(shards), StubAutoencoder())
    first = taken(stream, 10)
    assert sorted(first) == usable and first != usable
    assert sorted(taken(stream, 10)) == usable
    assert {reason.split()[0] for _, reason in stream.skipped} == {"no", "not"}
    both = [StreamLatents(config(shards), StubAutoencoder(), "cpu", r, 2) for r in range(2)]
    parts = [taken(stream, 5) for stream in both]
    assert not {*parts[0]} & {*parts[1]}
    assert len({*parts[0], *parts[1]}) == 10 or sorted(map(len, map(set, parts))) == [4, 5]
    later = StreamLatents(config(shards), StubAutoencoder())
    assert taken(later, 10, step=7) != first


def test_what_is_read_is_what_online_latents_are(shards: Path, tmp_path: Path) -> None:
    model = StubAutoencoder()
    stream = StreamLatents(config(shards), model)
    order = make_order(stream, [], 0, 4)
    assert isinstance(order, StreamOrder)
    rows = order(range(40, 44))
    moments = stream.read(rows).moments
    folder = DataConfig(kind="folder", path=str(write_folder(tmp_path / "d", COUNT)), image_size=16)
    online = OnlineLatents(open_source(folder), model, folder)
    numbers = [int(stream.captions(row)[0].split()[1]) for row in rows]
    names = [online.name(i) for i in range(COUNT)]
    places = [names.index(f"images/{number}.png") for number in numbers]
    assert torch.allclose(moments, online.read(places).moments, atol=1e-6)


def test_refusals(shards: Path, tmp_path: Path) -> None:
    for options, match in (
        ({"path": "./not-there"}, "does not exist"),
        ({"image_column": "imagee"}, "Did you mean 'image'"),
        ({"caption_column": "none"}, "no column 'none'"),
        ({"split": "tran"}, "Did you mean 'train'"),
        ({"buckets": True, "bucket_step": 8}, "needs the latent cache"),
        ({"loss_mask": "file"}, "loss_mask=file"),
    ):
        with pytest.raises(UserError, match=match):
            StreamLatents(config(shards, **options), StubAutoencoder())
    datasets.Dataset.from_dict({"image": [b"x", b"y"], "text": ["a", "b"]}).to_parquet(
        tmp_path / "d.parquet"
    )
    broken = StreamLatents(config(tmp_path), StubAutoencoder())
    with pytest.raises(UserError, match="0 usable images"):
        broken.take(range(1), 0)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = pa.array([b"caf\xe9"]).cast(pa.string(), False)
    pq.write_table(pa.table({"image": [png(0)], "text": text}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"a text that is not UTF-8.*data\.streaming=false"):
        StreamLatents(config(tmp_path), StubAutoencoder()).take(range(1), 0)
    (tmp_path / "far").symlink_to("/usr")
    with pytest.raises(UserError, match=r"far: a link that leaves.*data\.follow_links=true"):
        StreamLatents(config(tmp_path), StubAutoencoder())
    assert DataConfig(kind="folder", path="x", streaming=True).validate()
    with pytest.raises(UserError, match=r"train_latent\.py"):
        open_source(config(shards))


def test_a_quarantine_list_that_a_stream_would_ignore_is_refused() -> None:
    config = DataConfig(kind="hub", path="x", streaming=True, quarantine="list.jsonl")
    assert any("quarantine does not reach a stream" in problem for problem in config.validate())
