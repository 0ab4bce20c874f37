"""Every form in which diffusers writes a folder: the same outputs, and the same weights back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.formats.folder import check_layout, load_components, save_components
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from tests.random_models import make_pipeline, make_unet

FORMS: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "pickles": {"safe_serialization": False},
    "half precision": {"variant": "fp16"},
    "sharded": {"max_shard_size": "100KB"},
    "sharded half-precision pickles": {
        "variant": "fp16",
        "max_shard_size": "100KB",
        "safe_serialization": False,
    },
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    return make_pipeline()


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(form: str, theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("form") / "model"
    pipe = make_pipeline().to(torch.float16) if "half" in form else theirs
    pipe.save_pretrained(folder, **FORMS[form])
    return folder


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def test_the_same_outputs_and_image(folder: Path, form: str) -> None:
    from diffusers import StableDiffusionPipeline

    options: dict[str, Any] = {k: v for k, v in FORMS[form].items() if k == "variant"}
    if len(FORMS[form]) == 3:  # diffusers 0.42 writes sharded pickles of a variant; reads them not
        pipe = make_pipeline().to(torch.float16).to(torch.float32)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(
            str(folder), safety_checker=None, torch_dtype=torch.float32, **options
        )
    ours = load_components(folder)
    generator = torch.Generator().manual_seed(3)
    x, context = (torch.randn(*s, generator=generator) for s in ((2, 4, 16, 16), (2, 16, 24)))
    expected = pipe.unet(x, 500, context).sample
    assert relative(ours.unet(x, 500, context), expected) < 1e-5
    expected = pipe.vae.decode(x).sample
    assert relative(ours.autoencoder.module.decode(x), expected) < 1e-5
    ids = ours.text_encoder.tokenizer(["a cat", "dog paint"])
    expected = pipe.text_encoder(ids).last_hidden_state
    assert relative(ours.text_encoder.encode_tokens(ids), expected) < 1e-5

    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
    expected = pipe("a cat", latents=x[:1].clone(), **call).images
    found = LatentDiffusionPipeline(ours)("a cat", latents=x[:1], progress=False, **call).images
    assert expected.std() > 0.05  # not flat
    assert np.abs(found - expected).max() <= 2 / 255


def test_written_back_bit_for_bit(folder: Path, form: str, theirs: Any, tmp_path: Path) -> None:
    again = save_components(tmp_path / "again", load_components(folder))
    dtype = torch.float16 if "half" in form else torch.float32
    for part in ("unet", "vae", "text_encoder"):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        written = load_file(again / part / f"{stem}.safetensors")
        given = getattr(theirs, part).state_dict()
        written = {name.removeprefix("text_model."): t for name, t in written.items()}
        assert written.keys() == {name.removeprefix("text_model.") for name in given}
        for name, tensor in given.items():
            expected = tensor.to(dtype)
            assert torch.equal(written[name.removeprefix("text_model.")], expected), (part, name)


def test_variants_side_by_side(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "model")
    plain = load_components(tmp_path / "model").unet.conv_in.weight
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    newest = {name: t + 1 for name, t in load_file(weights).items()}
    save_file(newest, weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    assert torch.equal(load_components(tmp_path / "model").unet.conv_in.weight, plain)
    found = LatentDiffusionPipeline.from_pretrained(tmp_path / "model", variant="non_ema")
    assert torch.equal(found.unet.conv_in.weight, plain + 1)
    with pytest.raises(UserError, match=r"expected diffusion_pytorch_model\.fp16\.safetensors"):
        load_components(tmp_path / "model", variant="fp16")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_of_a_variant_under_the_names_of_older_releases(
    ending: str, theirs: Any, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path / "model")
    unet, stem = tmp_path / "model/unet", "diffusion_pytorch_model"
    state = load_file(unet / f"{stem}.safetensors")
    (unet / f"{stem}.safetensors").unlink()
    placed = {
        name: f"{stem}-0000{1 + n % 2}-of-00002.fp16.{ending}" for n, name in enumerate(state)
    }
    for file in set(placed.values()):
        part = {name: state[name] for name in state if placed[name] == file}
        (save_file if ending == "safetensors" else torch.save)(part, unet / file)
    index = unet / f"{stem}.{ending}.fp16.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    for variant in ("fp16", None):  # as for a whole file, there being no other
        found = load_components(tmp_path / "model", variant=variant).unet.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_weights_of_compiled_and_data_parallel_modules(
    wrapper: str, theirs: Any, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path / "model")
    plain = load_components(tmp_path / "model")
    for file in (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
    ):
        weights = tmp_path / f"model/{file}.safetensors"
        save_file({wrapper + name: t for name, t in load_file(weights).items()}, weights)
    found = load_components(tmp_path / "model")
    for part in ("unet", "autoencoder", "text_encoder"):
        ours, expected = (getattr(c, part).state_dict() for c in (found, plain))
        assert list(ours) == list(expected)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("variant", ["fp32", "non_ema", "fp16.non_ema"])
def test_the_only_variant_is_named(variant: str, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    with pytest.raises(UserError, match=rf"Name the variant: {re.escape(variant)} \("):
        load_components(tmp_path / "model")
    load_components(tmp_path / "model", variant=variant)


def test_each_part_keeps_its_dtype(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "model")
    make_unet().to(torch.float16).save_pretrained(tmp_path / "model/unet")
    again = save_components(tmp_path / "again", load_components(tmp_path / "model"))
    for part, stem, dtype in (
        ("unet", "diffusion_pytorch_model", torch.float16),
        ("vae", "diffusion_pytorch_model", torch.float32),
        ("text_encoder", "model", torch.float32),
    ):
        first, second = (
            load_file(f / part / f"{stem}.safetensors") for f in (tmp_path / "model", again)
        )
        assert {t.dtype for t in second.values()} == {dtype}
        assert all(torch.equal(second[f"text_model.{k}" if f"text_model.{k}" in second else k], t)
                   for k, t in first.items())  # fmt: skip


def test_needless_text_keys_are_listed_and_others_refused(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model/text_encoder/model.safetensors"
    state = load_file(weights)
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, weights)
    assert load_components(tmp_path / "model").dropped == ["text_encoder: embeddings.position_ids"]
    save_file(state | {"text_model.encoder.layers.7.mlp.fc1.bias": torch.zeros(2)}, weights)
    with pytest.raises(UserError, match=r"1 unexpected: encoder\.layers\.7\.mlp\.fc1\.bias"):
        load_components(tmp_path / "model")


def test_variants_and_pickles_of_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    from latentdiff.formats.hub import resolve_folder

    asked: list[dict[str, Any]] = []

    def snapshot_download(_: str, **options: Any) -> str:
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    resolve_folder("owner/name", variant="fp16")
    assert "*.fp16*" not in asked[0]["ignore_patterns"]
    assert "*.non_ema*" in asked[0]["ignore_patterns"]
    # There was no safetensors file at all, so pickles were asked for.
    assert "unet/*.bin" in asked[1]["allow_patterns"]
    # Other parts may have another kind of weights, the U-Net may not.
    later = [pattern for one in asked[2:] for pattern in one["allow_patterns"]]
    assert later and not any(pattern.startswith("unet/") for pattern in later)


def test_other_folders_are_refused_by_name(theirs: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    theirs.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for kind, name in (
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
        ("StableDiffusionDepth2ImgPipeline", "depth model"),
        ("FluxPipeline", "FLUX"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
        with pytest.raises(UserError, match=f"is .*{name}.* is not supported"):
            load_components(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    check_layout(folder)
    make_unet(in_channels=8).save_pretrained(folder / "unet")
    with pytest.raises(UserError, match=r"an InstructPix2Pix model .* 8 in_channels"):
        load_components(folder)
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match="unet missing"):
        load_components(folder)
