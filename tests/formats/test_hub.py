"""What is fetched from the hub: a folder stands for the repository, the hub's own filter picks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.formats.folder import load_components
from latentdiff.formats.hub import resolve_folder
from tests.random_models import make_pipeline

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
Hub = Callable[..., list[str]]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with float16 files alone, the U-Net's in shards."""
    folder = tmp_path_factory.mktemp("halves") / "model"
    pipe = make_pipeline().to(torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="40KB")
    assert len(list(folder.glob("unet/*.fp16*.safetensors"))) > 1
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Any) -> Hub:
    """Make a hub of files; returns what is asked for, one list of patterns per call."""

    def make(repository: Path) -> list[list[str]]:
        from huggingface_hub.utils import filter_repo_objects

        asked: list[list[str]] = []

        def snapshot_download(_: str, **options: Any) -> str:
            allow, ignore = options["allow_patterns"], options["ignore_patterns"]
            asked.append(allow)
            names = [str(f.relative_to(repository)) for f in repository.rglob("*") if f.is_file()]
            for name in filter_repo_objects(names, allow_patterns=allow, ignore_patterns=ignore):
                (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(repository / name, tmp_path / "cache" / name)
            return str(tmp_path / "cache")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    return make  # type: ignore[return-value]


def weights(folder: Path) -> set[str]:
    files = (f for f in folder.rglob("*") if f.suffix in (".safetensors", ".bin"))
    return {str(f.relative_to(folder)) for f in files}


def repository(folder: Path, *names: str) -> Path:
    """Empty files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_half_precision_alone_is_fetched_unasked(halves: Path, hub: Hub) -> None:
    hub(halves)
    found = load_components("owner/name", dtype=None)
    expected = load_components(halves, dtype=None)
    assert found.dtype_on_disk == torch.float16
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.unet.parameters(), expected.unet.parameters(), strict=True)
    )


def test_only_what_is_missing_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """Plain weights, pickles too, go before half-precision ones, part by part."""
    made = repository(
        tmp_path / "made",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bf16.safetensors",
        "unet/diffusion_pytorch_model.fp16.bin",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
    )
    asked = hub(made)
    assert weights(resolve_folder("owner/name")) == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.safetensors",
    }
    assert len(asked) == 3


@pytest.mark.parametrize("kind", ["fp16.bin", "bf16.safetensors", "bf16.bin"])
def test_other_half_precision_files(kind: str, hub: Hub, tmp_path: Path) -> None:
    names = {f"{part}/{stem}.{kind}" for part, stem in STEMS.items()}
    hub(repository(tmp_path / "made", *names))
    assert weights(resolve_folder("owner/name")) == names


def test_plain_weights_are_fetched_in_one_go(hub: Hub, tmp_path: Path) -> None:
    plain = {f"{part}/{stem}.safetensors" for part, stem in STEMS.items()}
    halves = {name.replace(".safetensors", ".fp16.safetensors") for name in plain}
    asked = hub(repository(tmp_path / "made", *plain, *halves))
    assert weights(resolve_folder("owner/name")) == plain and len(asked) == 1
    assert weights(resolve_folder("owner/name", variant="fp16")) == plain | halves
    # Half-precision files in the cache, of an earlier call, are no reason to leave others out.
    shutil.rmtree(tmp_path / "cache" / "vae")
    repository(tmp_path / "cache", "vae/diffusion_pytorch_model.fp16.safetensors")
    pickle = repository(tmp_path / "again", "vae/diffusion_pytorch_model.bin")
    hub(pickle)
    assert "vae/diffusion_pytorch_model.bin" in weights(resolve_folder("owner/name"))


def test_a_variant_that_is_asked_for_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    asked = hub(repository(tmp_path / "made", "unet/diffusion_pytorch_model.fp16.safetensors"))
    assert weights(resolve_folder("owner/name", variant="non_ema")) == set()
    assert not any(pattern.startswith("unet/*.") for one in asked[2:] for pattern in one)


def test_parts_without_the_variant_take_a_stand_in(hub: Hub, tmp_path: Path) -> None:
    names = {
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    }
    hub(repository(tmp_path / "made", *names, "unet/diffusion_pytorch_model.fp16.safetensors"))
    assert weights(resolve_folder("owner/name", variant="non_ema")) == names
