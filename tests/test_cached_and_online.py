"""Training on cached latents and on pictures encoded at every step is the same training."""

import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from tiny_training import arguments, losses, make_parts, make_pictures  # noqa: E402

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    make_parts(folder / "parts")
    pictures = make_pictures(folder / "pictures")
    for number in range(8):  # several captions with tags, some masks
        (pictures / f"{number}.txt").write_text(f"a, b, square {number}\nthe {number}")
    Image.new("L", (32, 32), 0).save(pictures / "3.mask.png")
    return folder


def train(folder: Path, name: str, *more: str) -> dict[int, float]:
    from train_latent import main

    usual = [f"loop.max_steps={STEPS}", "optimizer.warmup_steps=1", "data.loss_mask=file"]
    usual += ["captions.shuffle_tags=true", "captions.tag_dropout=0.2"]
    parts, pictures = folder / "parts", folder / "pictures"
    assert main(arguments(parts, pictures, folder / name, *usual, *more)) == 0
    return losses(folder / name)


def test_losses_agree(folder: Path) -> None:
    cached = train(folder, "cached")
    online = train(folder, "online", "latents.online=true")
    assert cached.keys() == online.keys() == set(range(1, STEPS + 1))
    differences = [abs(cached[step] - online[step]) for step in cached]
    assert 0 < max(differences) < 1e-3  # 0 would mean that both read the same 16-bit latents


def test_buckets_train_validate_and_export(folder: Path) -> None:
    wide = folder / "wide"
    make_pictures(wide, 4)
    for number in range(4):
        image = Image.open(wide / f"{number}.png").resize((48, 24))
        image.save(wide / f"wide-{number}.png")
        (wide / f"wide-{number}.txt").write_text("wide")
    more = [f"data.path={wide}", "data.buckets=true", "data.bucket_step=8"]
    more += ["data.image_size=32", "data.loss_mask=none"]
    more += ["data.validation_share=0.4", "validation.samples=6", "validation.every=6"]
    found = train(folder, "buckets", *more)
    assert len(found) == STEPS
    assert "validation_loss" in (folder / "buckets" / "metrics.jsonl").read_text()
    assert (folder / "buckets" / "model" / "model_index.json").is_file()
    again = train(folder, "again", *more, "loop.batch_size=2", "loop.gradient_accumulation=2")
    assert max(abs(found[step] - again[step]) for step in found) < 1e-4


def test_a_stream_trains(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": {"bytes": (folder / "pictures" / f"{n}.png").read_bytes(), "path": None},
         "text": f"square {n}"} for n in range(8)
    ]  # fmt: skip
    (folder / "table").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "table" / "train.parquet")
    more = ["data.kind=hub", f"data.path={folder / 'table'}", "data.streaming=true"]
    assert len(train(folder, "stream", *more, "data.loss_mask=none")) == STEPS
