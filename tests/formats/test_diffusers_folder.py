"""Stable Diffusion folders: what is written, refused, and left alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentdiff.errors import UserError
from latentdiff.formats.folder import Components, load_components, resolve_folder, save_components
from tests.random_models import make_pipeline, make_unet, make_vae


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def components(theirs: Path) -> Components:
    return load_components(theirs)


def states(components: Components) -> dict[str, torch.Tensor]:
    parts: dict[str, Any] = {
        "unet": components.unet,
        "vae": components.autoencoder.module,
        "text": components.text_encoder.module,
    }
    return {f"{p}.{k}": v for p, module in parts.items() for k, v in module.state_dict().items()}


def assert_same(a: Components, b: Components) -> None:
    for (name, x), (same, y) in zip(states(a).items(), states(b).items(), strict=True):
        assert name == same
        assert torch.equal(x, y), name
    assert a.unet.config == b.unet.config
    assert (a.schedule, a.prediction, a.sampling) == (b.schedule, b.prediction, b.sampling)
    assert torch.equal(a.text_encoder.tokenizer(["a cat"]), b.text_encoder.tokenizer(["a cat"]))


def test_round_trip(components: Components, tmp_path: Path) -> None:
    save_components(tmp_path / "ours", components)
    assert_same(load_components(tmp_path / "ours"), components)
    names = load_file(tmp_path / "ours/text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_configuration_fields_are_theirs(
    components: Components, theirs: Path, tmp_path: Path
) -> None:
    save_components(tmp_path / "ours", components)
    for part in ("unet", "vae"):
        expected = json.loads((theirs / part / "config.json").read_text())
        written = json.loads((tmp_path / "ours" / part / "config.json").read_text())
        changing = {"_diffusers_version", "_name_or_path"}
        assert {k: v for k, v in written.items() if k not in changing} == {
            k: v for k, v in expected.items() if k not in changing
        }


def test_shards(components: Components, tmp_path: Path) -> None:
    limit = 200_000
    save_components(tmp_path / "ours", components, max_shard_bytes=limit)
    files = sorted((tmp_path / "ours/unet").glob("*.safetensors"))
    assert len(files) > 1
    last = f"diffusion_pytorch_model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert files[-1].name == last
    assert all(file.stat().st_size < limit + 20_000 for file in files)
    assert_same(load_components(tmp_path / "ours"), components)
    files[0].unlink()
    with pytest.raises(UserError, match=files[0].name):
        load_components(tmp_path / "ours")


def test_float16_stays_float16(components: Components, tmp_path: Path) -> None:
    save_components(tmp_path / "half", components, torch.float16)
    loaded = load_components(tmp_path / "half")
    assert loaded.unet.dtype == torch.float32
    save_components(tmp_path / "again", loaded)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        first, second = (
            load_file(tmp_path / name / part / f"{stem}.safetensors") for name in ("half", "again")
        )
        for name, tensor in first.items():
            assert tensor.dtype == torch.float16
            assert torch.equal(tensor, second[name])
    assert load_components(tmp_path / "half", dtype=torch.float16).unet.dtype == torch.float16


def test_fourier_frequencies_stay_float32(theirs: Path, tmp_path: Path) -> None:
    unet = make_unet(time_embedding_type="fourier")
    unet.save_pretrained(shutil.copytree(theirs, tmp_path / "theirs") / "unet")
    save_components(tmp_path / "model", load_components(tmp_path / "theirs"), torch.float16)
    again = load_components(tmp_path / "model", dtype=torch.float16)
    assert torch.equal(again.unet.time_proj.weight, unet.time_proj.weight)


def test_pickles_are_read_without_running_them(theirs: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = shutil.copytree(theirs, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    weights.unlink()
    torch.save(state, weights.with_suffix(".bin"))
    assert torch.equal(load_components(folder).unet.conv_in.weight, state["conv_in.weight"])
    torch.save({"conv_in.weight": Evil()}, weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="cannot be read"):
        load_components(folder)
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_model(
    components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_components(tmp_path / "model", components)
    before = {p: p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(UserError, match="No space left"):
            save_components(tmp_path / "model", components)
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if ".writing-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        with pytest.raises(UserError, match="Input/output error"):
            save_components(tmp_path / "model", components)
    assert {p: p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_overwriting_keeps_what_is_not_ours(components: Components, tmp_path: Path) -> None:
    save_components(tmp_path / "model", components)
    (tmp_path / "model/README.md").write_text("mine")
    (tmp_path / "model/unet/stale.safetensors").touch()
    save_components(tmp_path / "model", components)
    assert (tmp_path / "model/README.md").read_text() == "mine"
    assert not (tmp_path / "model/unet/stale.safetensors").exists()


def test_refuses_to_replace_something_else(components: Components, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"not a model folder, but holds thesis\.tex"):
        save_components(tmp_path, components)
    with pytest.raises(UserError, match="it is a file"):
        save_components(tmp_path / "thesis.tex", components)
    with pytest.raises(UserError, match="cannot write"):
        save_components("/proc/model", components)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part(theirs: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(theirs, tmp_path / "model")
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=f"not a Stable Diffusion folder: {part} missing"):
        load_components(folder)


def test_parts_that_do_not_fit(theirs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(theirs, tmp_path / "model")
    make_unet(in_channels=8, out_channels=8).save_pretrained(folder / "unet")
    with pytest.raises(UserError, match=r"in_channels must equal .* latent channels \(4\); got 8"):
        load_components(folder)
    make_unet(cross_attention_dim=32).save_pretrained(folder / "unet")
    with pytest.raises(UserError, match=r"text encoder's width \(24\); got 32"):
        load_components(folder)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"cross_attention_dim": 24}))
    with pytest.raises(UserError, match="do not fit its config"):
        load_components(folder)
    (folder / "unet/config.json").write_text("{")
    with pytest.raises(UserError, match=r"unet.config\.json is not valid JSON"):
        load_components(folder)


def test_tiny_autoencoder(components: Components, tmp_path: Path) -> None:
    from latentdiff.models.autoencoder import Autoencoder

    tiny = Components(**{**vars(components), "autoencoder": Autoencoder(make_vae("tiny"))})
    save_components(tmp_path / "model", tiny)
    assert_same(load_components(tmp_path / "model"), tiny)


def test_names_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentdiff.formats.hub._download", lambda *_: pytest.fail("network"))
    assert resolve_folder("runs") == Path("runs")
    for name in ("./nothing", "/nothing", "runs/nothing", "nothing", "a/b/c", Path("a/b")):
        with pytest.raises(UserError, match="this folder does not exist"):
            resolve_folder(name)
    with pytest.raises(UserError, match="is a file"):
        resolve_folder("file")


def test_the_output_of_a_training_says_where_its_model_is(
    components: Components, tmp_path: Path
) -> None:
    run = tmp_path / "mine"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    with pytest.raises(UserError, match=r"has not written its model yet: go on with --resume"):
        load_components(run)
    (run / "learned_embeds.safetensors").touch()
    with pytest.raises(UserError, match=r"to be given with --embedding .*mine\."):
        load_components(run)
    (run / "lora").mkdir()
    with pytest.raises(UserError, match=r"to be given with --lora .*mine/lora\."):
        load_components(run)
    save_components(run / "model-sigma-0.1", components)
    with pytest.raises(UserError, match=r"Did you mean .*mine/model-sigma-0\.1\?"):
        load_components(run)
    save_components(run / "model", components)
    with pytest.raises(UserError, match=r"vae.* missing.*Did you mean .*mine/model\?$"):
        load_components(run)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"tokenizer, scheduler\.$"):
        load_components(tmp_path / "other")


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, theirs: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        if "bad" in name:
            raise ConnectionError("no route to host")
        return str(theirs)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_folder("somebody/some-model_1.5", "v2") == theirs
    assert (asked["name"], asked["revision"]) == ("somebody/some-model_1.5", "v2")
    assert not any(pattern.endswith((".ckpt", ".bin")) for pattern in asked["allow_patterns"])
    with pytest.raises(UserError, match=r"could not be fetched.*no route to host"):
        resolve_folder("somebody/bad")


def test_a_models_own_guidance_is_kept_and_used(components: Components, tmp_path: Path) -> None:
    from latentdiff.pipelines.generate import DEFAULT_GUIDANCE, LatentDiffusionPipeline

    sampling = dataclasses.replace(components.sampling, guidance_scale=2.0)
    save_components(tmp_path / "own", dataclasses.replace(components, sampling=sampling))
    own = LatentDiffusionPipeline.from_pretrained(tmp_path / "own")
    assert own.default_guidance == 2.0
    assert LatentDiffusionPipeline(components).default_guidance == DEFAULT_GUIDANCE

    def sample_image(**options: Any) -> torch.Tensor:
        made: torch.Tensor = own(
            "a cat", seed=0, num_inference_steps=2, output_type="latent", progress=False, **options
        ).images
        return made

    assert torch.equal(sample_image(), sample_image(guidance_scale=2.0))
    assert not torch.equal(sample_image(), sample_image(guidance_scale=5.0))


@pytest.mark.parametrize("value", ["high", -1, float("inf")])
def test_a_broken_guidance_file_is_named(
    value: Any, components: Components, tmp_path: Path
) -> None:
    save_components(tmp_path / "own", components)
    (tmp_path / "own/generation_config.json").write_text(json.dumps({"guidance_scale": value}))
    with pytest.raises(UserError, match=r"generation_config\.json must be a number of at least 0"):
        load_components(tmp_path / "own")
