"""Training on cached latents and on images encoded at every step is the same training."""

import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from tiny_training import arguments, losses, make_images, make_parts  # noqa: E402

STEPS = 12


def test_cache_and_training_take_the_same_image_size_of_a_pretrained_model() -> None:
    from latentdiff.train.config import read_config
    from latentdiff.train.parts import frozen_autoencoder, load_parts

    for more in ([], ["data.image_size=128"]):
        wanted = read_config(None, ["model.pretrained=embedded", *more])
        parts, config, _ = load_parts(wanted)
        autoencoder, ours = frozen_autoencoder(wanted)
        assert ours.data == config.data
        theirs = parts.autoencoder.state_dict()
        assert all(bool((v == theirs[k]).all()) for k, v in autoencoder.state_dict().items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    make_parts(folder / "parts")
    images = make_images(folder / "images")
    for number in range(8):  # several captions with tags, some masks
        (images / f"{number}.txt").write_text(f"a, b, square {number}\nthe {number}")
    Image.new("L", (32, 32), 0).save(images / "3.mask.png")
    return folder


def given(folder: Path, name: str, *more: str) -> list[str]:
    usual = [f"loop.max_steps={STEPS}", "optimizer.warmup_steps=1", "data.loss_mask=file"]
    usual += ["captions.shuffle_tags=true", "captions.tag_dropout=0.2"]
    return arguments(folder / "parts", folder / "images", folder / name, *usual, *more)


def train(folder: Path, name: str, *more: str) -> dict[int, float]:
    from train_latent import main

    assert main(given(folder, name, *more)) == 0
    return losses(folder / name)


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_losses_agree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cache_latents import main as cache_latents

    assert cache_latents(given(folder, "cached")) == 0
    assert "complete: 8 images" in capsys.readouterr().out
    before = files(folder / "cache")
    cached = train(folder, "cached")
    assert files(folder / "cache") == before  # training found every latent
    online = train(folder, "online", "latents.online=true")
    assert cached.keys() == online.keys() == set(range(1, STEPS + 1))
    differences = [abs(cached[step] - online[step]) for step in cached]
    assert 0 < max(differences) < 1e-3  # 0 would mean that both read the same 16-bit latents


@pytest.mark.slow
def test_buckets_train_validate_and_export(folder: Path) -> None:
    wide = folder / "wide"
    make_images(wide, 4)
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


@pytest.mark.slow
def test_a_stream_trains(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": {"bytes": (folder / "images" / f"{n}.png").read_bytes(), "path": None},
         "text": f"square {n}"} for n in range(8)
    ]  # fmt: skip
    (folder / "table").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "table" / "train.parquet")
    more = ["data.kind=hub", f"data.path={folder / 'table'}", "data.streaming=true"]
    assert len(train(folder, "stream", *more, "data.loss_mask=none")) == STEPS
