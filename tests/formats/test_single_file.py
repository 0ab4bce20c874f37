"""Single files: diffusers reads what we write; what others write opens whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.cli import convert as convert
from latentdiff.errors import UserError
from latentdiff.formats import single_file as single_file
from latentdiff.formats.folder import load_components
from latentdiff.formats.identify import CONFIGURATION
from latentdiff.formats.key_map import PARTS, compvis_layout, ema_key, to_compvis
from latentdiff.formats.model import load_model, open_autoencoder, open_text_encoder, save_model
from latentdiff.formats.sd_facts import sd_configuration
from latentdiff.formats.single_file import load_single_file, measured_prediction
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.tensor_file import TensorFile
from tests.formats.test_compvis_keys import parts
from tests.formats.test_diffusers_folder import assert_same
from tests.random_models import make_pipeline, make_text_model, make_vae

KINDS = ("sd1", "sd2")
UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"


def theirs(kind: str) -> Any:
    """A small pipeline of diffusers, of the one or the other shape."""
    if kind == "sd1":
        return make_pipeline()
    pipe = make_pipeline(use_linear_projection=True, attention_head_dim=[2, 4])
    pipe.text_encoder = make_text_model(hidden_act="gelu")
    return pipe


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    theirs(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return save_model(folder.with_name("model.safetensors"), load_components(folder))


@pytest.fixture
def changed(file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the file again with other tensors or metadata."""

    def write(
        change: Callable[[dict[str, Tensor]], Any] | None = None, **metadata: str | None
    ) -> Path:
        with safe_open(file, "pt") as opened:
            kept = dict(opened.metadata()) | metadata
        tensors = load_file(file)
        if change is not None:
            change(tensors)
        save_file(tensors, tmp_path / "m.safetensors", {k: v for k, v in kept.items() if v})
        return tmp_path / "m.safetensors"

    return write


def test_diffusers_reads_it_as_the_folder(folder: Path, file: Path) -> None:
    from diffusers import StableDiffusionPipeline

    options = {"safety_checker": None, "local_files_only": True}
    read = StableDiffusionPipeline.from_single_file(str(file), config=str(folder), **options)
    expected = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        ours, own = getattr(read, part).state_dict(), getattr(expected, part).state_dict()
        assert ours.keys() == own.keys()
        assert all(torch.equal(ours[name], own[name]) for name in own), part


def test_folder_to_file_to_folder(folder: Path, file: Path, tmp_path: Path) -> None:
    again = save_model(tmp_path / "again", load_model(file))
    assert_same(load_components(again), load_components(folder))
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        first, second = (load_file(p / part / f"{name}.safetensors") for p in (folder, again))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_same_image_as_diffusers_from_the_same_latents(folder: Path, file: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = pipe(
        "a cat", latents=latents.clone(), num_inference_steps=5, guidance_scale=4, output_type="np"
    ).images
    found = LatentDiffusionPipeline.from_pretrained(file)(
        "a cat",
        latents=latents,
        num_inference_steps=5,
        guidance_scale=4,
        output_type="np",
        progress=False,
    ).images
    assert expected.std() > 0.05  # not flat
    assert np.abs(found - expected).max() <= 2 / 255


def test_metadata(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        meta = opened.metadata()
    assert meta["modelspec.sai_model_spec"] == "1.0.0"
    assert meta["modelspec.title"] == "model" and meta["modelspec.resolution"] == "32x32"
    assert meta["modelspec.prediction_type"] == "epsilon"
    assert json.loads(meta[CONFIGURATION]).keys() >= {*PARTS, "scheduler", "tokenizer"}
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert meta["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data[start:]).hexdigest()


def test_parts_of_a_file(file: Path) -> None:
    whole = load_model(file)
    vae, text = open_autoencoder(file), open_text_encoder(file)
    for one, other in ((vae, whole.autoencoder), (text, whole.text_encoder)):
        pairs = zip(one.module.state_dict().values(), other.module.state_dict().values())  # noqa: B905
        assert all(torch.equal(a, b) for a, b in pairs)


def test_what_is_needless_is_left_out_and_listed(changed: Callable[..., Path], file: Path) -> None:
    extra = {
        "betas": torch.zeros(3),
        "sqrt_one_minus_alphas_cumprod": torch.zeros(3),
        "log_one_minus_alphas_cumprod": torch.zeros(3),
        "posterior_mean_coef2": torch.zeros(3),
        "model_ema.decay": torch.zeros(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 16),
        "cond_stage_model.model.text_projection": torch.zeros(2, 2),
        "cond_stage_model.model.transformer.resblocks.2.ln_1.weight": torch.zeros(24),
    }
    loaded = load_single_file(changed(lambda tensors: tensors.update(extra)))
    assert sorted([*loaded.dropped, *loaded.spare]) == sorted(extra)
    assert_same(loaded, load_single_file(file))


def openclip_rest(layer: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layer after the last and what is beside the layers, as in OpenCLIP's tower."""
    start = "cond_stage_model.model."
    block, width = f"{start}transformer.resblocks.", len(like[f"{start}ln_final.bias"])
    before = f"{block}{layer - 1}."
    last = {n.replace(before, f"{block}{layer}."): t for n, t in like.items() if before in n}
    last |= {f"{start}text_projection": torch.zeros(width, width)}
    last |= {f"{start}logit_scale": torch.zeros(())}
    # Numbers that 16 bits hold too.
    return {n: torch.full(t.shape, 0.5 + i) for i, (n, t) in enumerate(sorted(last.items()))}


@pytest.mark.parametrize("folder", ["sd2"], indirect=True)
def test_openclips_last_layer_is_kept_in_files(
    changed: Callable[..., Path], folder: Path, file: Path, tmp_path: Path, capsys: Any
) -> None:
    from diffusers import StableDiffusionPipeline

    first = load_file(file)
    rest = openclip_rest(2, first)
    assert len(rest) == 14
    whole = changed(lambda tensors: tensors.update(rest))
    for target, dtype in ((tmp_path / "32.safetensors", None), (tmp_path / "16.safetensors", "16")):
        options = ["--dtype", "float16"] if dtype else []
        assert convert.main([str(whole), str(target), *options]) == 0
        assert "left out" not in capsys.readouterr().out
        written = load_file(target)
        assert written.keys() == first.keys() | rest.keys()
        for name, tensor in rest.items():
            assert written[name].dtype == (torch.float16 if dtype else torch.float32)
            assert torch.equal(written[name].float(), tensor), name
    assert load_single_file(target).spare.keys() == rest.keys()

    read = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "32.safetensors"), config=str(folder), safety_checker=None
    )
    expected = load_components(folder).text_encoder.weights()
    own = read.text_encoder.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(own.get(name, own.get(name.removeprefix("text_model."))), tensor)

    assert convert.main([str(whole), str(tmp_path / "again")]) == 0
    assert "left out 14 keys" in capsys.readouterr().out
    assert_same(load_components(tmp_path / "again"), load_components(folder))


def test_a_missing_last_layer_is_said(monkeypatch: Any, tmp_path: Path) -> None:
    tensors = virtual("2")
    for rest in ({}, openclip_rest(23, tensors)):
        meta = {"modelspec.prediction_type": "v"}
        whole = TensorFile(tmp_path / "sd.ckpt", tensors | rest, meta)
        monkeypatch.setattr(single_file, "read_tensor_file", lambda _, whole=whole: whole)
        components = load_single_file(tmp_path / "sd.ckpt", dtype=None)
        said = convert.report(tmp_path / "new.safetensors", components)
        assert ("23 text layers" in said) == (not rest)
        assert "left out" not in said and "not of Stable Diffusion" not in said


def test_names_without_text_model(changed: Callable[..., Path], file: Path) -> None:
    start = "cond_stage_model.transformer."

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(start)]:
            tensors[name.replace(f"{start}text_model.", start)] = tensors.pop(name)

    assert_same(load_single_file(changed(change)), load_single_file(file))


def test_a_tiny_autoencoder_keeps_its_names(file: Path, tmp_path: Path) -> None:
    whole = load_single_file(file)
    tiny = dataclasses.replace(whole, autoencoder=Autoencoder(make_vae("tiny")))
    again = load_single_file(save_model(tmp_path / "tiny.safetensors", tiny))
    assert again.autoencoder.is_tiny
    assert_same(again, tiny)


def test_missing_and_unexpected_keys_are_listed(changed: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.diffusion_model.out.3.weight"] = tensors.pop(
            "model.diffusion_model.out.2.weight"
        )

    with pytest.raises(UserError) as caught:
        load_single_file(changed(change))
    assert "1 missing: model.diffusion_model.out.2.weight" in str(caught.value)
    assert "1 unexpected: model.diffusion_model.out.3.weight" in str(caught.value)


def test_another_shape_is_named(changed: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["first_stage_model.quant_conv.bias"] = torch.zeros(3)

    with pytest.raises(UserError, match=r"1 of another shape: quant_conv\.bias"):
        load_single_file(changed(change))


def test_averaged_weights_are_taken_unless_the_newest_are_asked_for(
    changed: Callable[..., Path], file: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        newest = {k: t for k, t in tensors.items() if k.startswith("model.diffusion_model.")}
        tensors.update({ema_key(k): t + 1 for k, t in newest.items()})

    both, first = changed(change), load_single_file(file).unet.conv_in.weight
    assert torch.equal(load_single_file(both).unet.conv_in.weight, first + 1)
    newest = load_single_file(both, variant="non_ema")
    assert torch.equal(newest.unet.conv_in.weight, first)
    assert any(name.startswith("model_ema.diffusion_model") for name in newest.dropped)
    with pytest.raises(UserError, match="ema or non_ema"):
        load_single_file(both, variant="fp16")
    with pytest.raises(UserError, match="no averaged weights"):
        load_single_file(file, variant="ema")


def test_pickles_of_training_libraries_open(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    # Their files have the class of a callback as a key; the library need not be there.
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, name, module)
        data = {"state_dict": load_file(file), "global_step": 5, "callbacks": {callback: {"a": 1}}}
        torch.save(data, tmp_path / "m.ckpt")
        torch.save(data, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with safe_open(file, "pt") as opened:
        meta = opened.metadata()
    for found in ("m.ckpt", "old.ckpt"):
        read = single_file.read_tensor_file(tmp_path / found)
        assert read.facts["global_step"] == 5
        whole = TensorFile(read.path, read.tensors, meta)
        with monkeypatch.context() as patch:  # a pickle has no metadata to say the small sizes
            patch.setattr(single_file, "read_tensor_file", lambda _, whole=whole: whole)
            assert_same(load_single_file(tmp_path / found), load_single_file_of(file))


def load_single_file_of(file: Path) -> Any:
    """Without the patched reader."""
    from latentdiff.tensor_file import read_tensor_file

    keep, single_file.read_tensor_file = single_file.read_tensor_file, read_tensor_file
    try:
        return load_single_file(file)
    finally:
        single_file.read_tensor_file = keep


def virtual(version: str, **replaced: Any) -> dict[str, Tensor]:
    """A checkpoint of full size whose tensors take no memory: one number, seen many times."""
    return {n: torch.zeros(1).expand(shape) for n, shape in shapes_of(version).items()} | replaced


@functools.cache
def shapes_of(version: str) -> dict[str, torch.Size]:
    """Key and shape of every tensor in a file of that version."""
    from latentdiff.models.unet_config import config_from_dict

    config = sd_configuration(version, "eps")
    unet = config_from_dict(config["unet"])
    states = parts(unet, config["vae"], config["text_encoder"])
    layout = compvis_layout(unet, config["vae"], config["text_encoder"], states)
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        tensors |= to_compvis(states[part], layout[part], part)
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("version", "metadata", "expected"),
    [
        ("1", {}, ("eps", 64, 768)),
        ("1", {"modelspec.prediction_type": "v"}, ("v", 64, 768)),
        ("2", {"modelspec.architecture": "stable-diffusion-v2-512"}, ("eps", 64, 1024)),
        ("2", {"modelspec.prediction_type": "v"}, ("v", 96, 1024)),
    ],
)
def test_stable_diffusion_by_its_keys_alone(
    version: str, metadata: dict[str, str], expected: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    whole = TensorFile(tmp_path / "sd.safetensors", virtual(version), metadata)
    monkeypatch.setattr(single_file, "read_tensor_file", lambda _: whole)
    found = load_single_file(tmp_path / "sd.safetensors")
    unet = found.unet.config
    assert (found.prediction, unet.sample_size, unet.cross_attention_dim) == expected
    assert unet.heads == ((8,) * 4 if version == "1" else (5, 10, 20, 20))
    assert len(found.text_encoder.module.encoder["layers"]) == (12 if version == "1" else 23)
    assert (found.autoencoder.scale, found.autoencoder.downscale) == (0.18215, 8)
    row = found.text_encoder.tokenizer(["a photo of a cat"])[0].tolist()
    pad = 49407 if version == "1" else 0
    assert row == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70


@pytest.mark.parametrize(
    ("version", "metadata"),
    [("1", {}), ("2", {"modelspec.architecture": "stable-diffusion-v2-inpainting"})],
)
def test_stable_diffusion_for_inpainting(
    version: str, metadata: dict[str, str], monkeypatch: Any, tmp_path: Path
) -> None:
    tensors = virtual(version, **{FIRST: torch.zeros(1).expand(320, 9, 3, 3)})
    whole = TensorFile(tmp_path / "sd.ckpt", tensors, metadata)
    monkeypatch.setattr(single_file, "read_tensor_file", lambda _: whole)
    found = load_single_file(tmp_path / "sd.ckpt", dtype=None)
    unet = found.unet.config
    assert (found.prediction, unet.sample_size, unet.in_channels, unet.inpaints) == (
        *("eps", 64, 9),
        True,
    )
    named = single_file.modelspec(found, "x")["modelspec.architecture"]
    assert named == f"stable-diffusion-v{version}-inpainting"


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_inpainting_models_go_to_diffusers_and_back(name: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline

    pipe = make_pipeline(in_channels=9)
    parts = {part: getattr(pipe, part) for part in ("vae", "unet", "scheduler", "tokenizer")}
    parts |= {"text_encoder": pipe.text_encoder, "safety_checker": None, "feature_extractor": None}
    folder = tmp_path / "theirs"
    StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    ours = save_model(tmp_path / name, load_components(folder))
    if ours.is_dir():
        read = DiffusionPipeline.from_pretrained(ours, safety_checker=None)
    else:
        options = {"config": str(folder), "safety_checker": None, "local_files_only": True}
        read = StableDiffusionInpaintPipeline.from_single_file(str(ours), **options)
    assert isinstance(read, StableDiffusionInpaintPipeline)
    expected, found = pipe.unet.state_dict(), read.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert_same(load_model(ours), load_components(folder))


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(("gain", "expected"), [(1.0, "eps"), (-0.07, "v"), (0.0, "v")])
def test_prediction_from_what_the_network_does(
    gain: float, expected: str, channels: int, file: Path
) -> None:
    components = load_single_file(file)

    class Network:
        config = dataclasses.replace(components.unet.config, in_channels=channels)
        dtype = torch.float32

        def __call__(self, x_t: Tensor, timestep: float, context: Tensor) -> Tensor:
            assert x_t.shape[1] == channels
            return gain * x_t[:, :4] + 0.3 * torch.roll(x_t[:, :4], 1, dims=-1)

    assert measured_prediction(Network(), components.text_encoder) == expected  # type: ignore[arg-type]


def test_a_step_count_or_a_mark_tells_the_prediction(monkeypatch: Any, tmp_path: Path) -> None:
    for extra, facts, expected in (
        ({}, {"global_step": 875_000}, ("eps", False)),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, ("v", True)),
    ):
        whole = TensorFile(tmp_path / "sd.ckpt", virtual("2", **extra), {}, facts)
        monkeypatch.setattr(single_file, "read_tensor_file", lambda _, whole=whole: whole)
        found = load_single_file(tmp_path / "sd.ckpt")
        assert (found.prediction, found.schedule.zero_terminal_snr) == expected


def other(key: str, *shape: int) -> dict[str, Tensor]:
    return {key: torch.zeros(shape)}


READS = f"{UNET}input_blocks.1.1.attn2.to_k.weight"
VAE, TEXT = "first_stage_model.quant_conv.bias", "cond_stage_model.transformer.text_model.x"
SD1 = other(FIRST, 320, 4, 3, 3) | other(READS, 320, 768)


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        (other("conditioner.embedders.1.model.ln_final.weight", 2), "Stable Diffusion XL"),
        (other("conditioner.embedders.0.model.ln_final.weight", 2), "refiner of Stable Diffusion"),
        (other(f"{UNET}joint_blocks.0.x.weight", 2), "Stable Diffusion 3"),
        (other("double_blocks.0.img_attn.weight", 2), "FLUX"),
        (other("control_model.time_embed.0.weight", 2), "a ControlNet"),
        (other("lora_unet_mid_block_attn1_to_q.lora_down.weight", 4, 8), "a LoRA"),
        (other("emb_params", 2, 768), "a textual inversion"),
        (other("down_blocks.0.resnets.0.conv1.weight", 2), "U-Net of a diffusers folder"),
        (other("encoder.down.0.block.0.conv1.weight", 2), "an autoencoder alone"),
        (other("weird", 2), "something unknown"),
        (other(FIRST, 320, 9, 3, 3) | other(READS, 320, 768), r"1\.x for inpainting without its"),
        (other(FIRST, 320, 9, 3, 3) | other(READS, 320, 555), r"of its own \(9 input channels"),
        (other(FIRST, 320, 5, 3, 3) | other(READS, 320, 1024), "a depth model"),
        (other(FIRST, 320, 8, 3, 3) | other(READS, 320, 768), "InstructPix2Pix"),
        (other(FIRST, 320, 4, 3, 3) | other(READS, 320, 555), "does not say its configuration"),
        (SD1, "1.x without its autoencoder and text encoder"),
        (SD1 | other(VAE, 2), "1.x without its text encoder"),
        (SD1 | other(TEXT, 2), "1.x without its autoencoder"),
        (other(VAE, 2) | other(TEXT, 2), "autoencoder and text encoder .* without the U-Net"),
        (other("input_blocks.0.0.weight", 320, 4, 3, 3), "the U-Net of a single file, alone"),
    ],
)
def test_other_models_are_refused_by_name(
    tensors: dict[str, Tensor], name: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=f"is .*{name}.* does not open as a text-to-image model"):
        load_model(tmp_path / "m.safetensors")


def test_damaged_files(file: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1000])
    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.ckpt")
    torch.save({"state_dict": load_file(file)}, tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-1000])
    torch.save([1, 2], tmp_path / "list.ckpt")
    (tmp_path / "text.safetensors").write_text("version https://git-lfs")
    for name, words in {
        "cut.safetensors": "cut off or damaged",
        "evil.ckpt": "more than tensors and could run code",
        "cut.ckpt": "cannot be read",
        "list.ckpt": "holds a list",
        "text.safetensors": "a Git LFS pointer",
        "nothing.ckpt": "does not exist",
    }.items():
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_damaged_configuration(changed: Callable[..., Path]) -> None:
    for text in ("{", "[]", "{}", '{"unet": 3}'):
        with pytest.raises(UserError, match="configuration"):
            load_single_file(changed(**{CONFIGURATION: text}))


def test_a_failed_write_leaves_the_old_file(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    components, target = load_single_file(file), tmp_path / "m.safetensors"
    target.write_bytes(b"old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_model(target, components)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_float16_on_disk_stays(folder: Path, tmp_path: Path) -> None:
    half = save_model(tmp_path / "half.safetensors", load_components(folder), torch.float16)
    assert {t.dtype for t in load_file(half).values()} == {torch.float16}
    again = save_model(tmp_path / "again.safetensors", load_model(half))
    first, second = load_file(half), load_file(again)
    assert all(torch.equal(first[k], second[k]) and second[k].dtype == torch.float16 for k in first)
    assert load_model(half, dtype=torch.float16).unet.dtype == torch.float16
