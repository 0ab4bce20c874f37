"""LoRA files on a pipeline: ours in diffusers, diffusers' here, several at once, and what does not
fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdiff.cli import inspect as inspect
from latentdiff.errors import UserError
from latentdiff.formats.lora import write_lora
from latentdiff.models.low_rank import LowRank, layers_of, norms_of
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.pipelines.lora import parts_of
from tests.random_models import make_pipeline

ENDS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2", "q_proj", "k_proj")
ENDS += ("v_proj", "out_proj")
LAYOUTS = ("diffusers", "kohya")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


def make(pipeline: LatentDiffusionPipeline, seed: int, dora: bool = False) -> dict[str, LowRank]:
    """Changes of all kinds of layers; α ≠ rank."""
    torch.manual_seed(seed)
    found = {}
    for part, network in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder.module)):
        for name, layer in layers_of(network).items():
            if not name.endswith(ENDS):
                continue
            weight, rank = layer.weight, 2
            down = torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5
            up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2)) * 0.1
            magnitude = weight.detach().flatten(1).norm(dim=1) * 1.2 if dora else None
            found[f"{part}.{name}"] = LowRank(down, up, 5.0, magnitude)
    return found


def sample_image(pipeline: LatentDiffusionPipeline) -> Tensor:
    """In 0 … 1."""
    return pipeline(
        "a cat", seed=0, num_inference_steps=3, output_type="pt", progress=False, sampler="ddim"
    ).images


def output(pipeline: LatentDiffusionPipeline) -> Tensor:
    """What the U-Net says of a fixed input with the text encoder's context, about 1 in size."""
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipeline.unet(
            x.to(pipeline.unet.dtype), 300, pipeline.text_encoder.encode(["a cat"])
        )


@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_equals_attached(model: Path, tmp_path: Path, layout: Any, dora: bool) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    plain = output(pipeline)
    files = [
        write_lora(tmp_path / f"{n}.safetensors", make(pipeline, n, dora), layout) for n in (1, 2)
    ]
    pipeline.load_lora(files[0], 0.8)
    pipeline.load_lora(files[1], -0.5, name="other")
    assert pipeline.loras.names == {"1": 0.8, "other": -0.5}
    attached = output(pipeline)
    assert pipeline.unet.state_dict().keys() == before.keys()
    assert (attached - plain).abs().max() > 0.1
    pipeline.fuse_lora()
    scale = attached.abs().max()
    assert (output(pipeline) - attached).abs().max() < 1e-5 * scale
    pipeline.unload_lora()
    assert all(torch.equal(v, before[k]) for k, v in pipeline.unet.state_dict().items())
    assert torch.equal(output(pipeline), plain)
    # In the other order, one fused before the other comes: the same.
    pipeline.load_lora(files[1], -0.5)
    pipeline.fuse_lora()
    pipeline.load_lora(files[0], 0.8)
    assert (output(pipeline) - attached).abs().max() < 1e-5 * scale
    pipeline.unload_lora("1")
    pipeline.unload_lora("2")
    assert torch.equal(output(pipeline), plain)


def test_strength_is_a_straight_line_in_the_weights(model: Path, tmp_path: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    file = write_lora(tmp_path / "a.safetensors", make(pipeline, 1, dora=True))
    plain, layer = output(pipeline), "mid_block.attentions.0.proj_in.weight"
    own = pipeline.unet.state_dict()[layer].clone()
    pipeline.load_lora(file, 0.0)
    assert torch.equal(output(pipeline), plain)
    pipeline.unload_lora()
    moved = []
    for strength in (1.0, 0.25):
        pipeline.load_lora(file, strength)
        pipeline.fuse_lora()
        moved.append(pipeline.unet.state_dict()[layer] - own)
        pipeline.unload_lora()
    torch.testing.assert_close(0.25 * moved[0], moved[1], rtol=1e-4, atol=1e-6)


def test_half_precision_and_moving(model: Path, tmp_path: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    file = write_lora(tmp_path / "a.safetensors", make(pipeline, 1))
    pipeline.load_lora(file)
    exact = output(pipeline)
    pipeline.to(dtype=torch.bfloat16)
    assert (output(pipeline).float() - exact).abs().max() < 0.1 * exact.abs().max()
    pipeline.fuse_lora()
    assert pipeline.unet.dtype == torch.bfloat16
    assert (output(pipeline).float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_saving_says_that_attached_files_would_be_lost(model: Path, tmp_path: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    pipeline.load_lora(write_lora(tmp_path / "a.safetensors", make(pipeline, 1)))
    with pytest.raises(UserError, match=r"a are attached.*fuse_lora"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipeline.fuse_lora()
    pipeline.save_pretrained(tmp_path / "saved")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(output(again), output(pipeline))


def open_theirs(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def assert_same_image(theirs: Any, ours: LatentDiffusionPipeline) -> None:
    """At most 2/255 apart, not flat."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 10, "guidance_scale": 4.0, "latents": noise}
    expected = np.asarray(theirs("a cat", **options).images[0], int)
    found = np.asarray(ours("a cat", **options, sampler="ddim", progress=False).images[0], int)
    assert np.abs(found - expected).max() <= 2
    assert found.std() >= 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_reads_what_is_written_here(model: Path, tmp_path: Path, layout: Any) -> None:
    ours, theirs = LatentDiffusionPipeline.from_pretrained(model), open_theirs(model)
    plain = sample_image(ours)
    file = write_lora(tmp_path / "ours.safetensors", make(ours, 1), layout)
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    ours.load_lora(file)
    assert (sample_image(ours) - plain).abs().max() > 0.05
    assert_same_image(theirs, ours)


def test_what_diffusers_writes_is_read_here(model: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs, ours = open_theirs(model), LatentDiffusionPipeline.from_pretrained(model)
    plain = sample_image(ours)
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1"])
    theirs.unet.add_adapter(settings)
    text = LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj", "out_proj"])
    theirs.text_encoder.add_adapter(text)
    torch.manual_seed(0)
    for network in (theirs.unet, theirs.text_encoder):
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.2)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.unet)),
        convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.text_encoder)),
        **_collate_lora_metadata({"unet": theirs.unet, "text_encoder": theirs.text_encoder}),
    )
    ours.load_lora(tmp_path)
    assert (sample_image(ours) - plain).abs().max() > 0.05
    assert_same_image(theirs, ours)


def comfy_names(model: Path, folder: Path) -> dict[str, str]:
    """Layers → what ComfyUI calls them, by where a single file keeps the same weights."""
    pipeline, file = LatentDiffusionPipeline.from_pretrained(model), folder / "whole.safetensors"
    for norm in norms_of(pipeline.unet).values():  # are all ones otherwise
        nn.init.normal_(norm.weight)
    pipeline.save_pretrained(file)
    stored = load_file(file)
    found = {}
    for name, layer in (layers_of(pipeline.unet) | norms_of(pipeline.unet)).items():
        (key,) = (k for k, t in stored.items() if torch.equal(t.reshape(-1), layer.weight.ravel()))
        found[f"unet.{name}"] = key.removeprefix("model.").removesuffix(".weight")
    for name, _ in pipeline.text_encoder.module.named_modules():
        found[f"text_encoder.{name}"] = f"text_encoders.clip_l.transformer.text_model.{name}"
    return found


@pytest.mark.parametrize("flat", (False, True))
def test_names_of_comfyui_and_compvis(model: Path, tmp_path: Path, flat: bool) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    changes, theirs = make(pipeline, 1), comfy_names(model, tmp_path)
    assert theirs["unet.conv_in"] == "diffusion_model.input_blocks.0.0"
    state = {}
    for name, change in changes.items():
        key = theirs[name]
        if flat:
            key = re.sub(r"^diffusion_model\.|^text.*transformer\.", "lora_unet_", key)
            key = key.replace(".", "_").replace("lora_unet_text_model", "lora_te_text_model")
        state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = change.down, change.up
        state[f"{key}.alpha"] = torch.tensor(change.alpha)
    save_file(state, tmp_path / "comfy.safetensors")
    pipeline.load_lora(tmp_path / "comfy.safetensors")
    found = output(pipeline)
    pipeline.unload_lora()
    pipeline.load_lora(write_lora(tmp_path / "ours.safetensors", changes))
    assert torch.equal(found, output(pipeline))


def test_comfyuis_differences_of_norms_and_biases(model: Path, tmp_path: Path) -> None:
    """What its extraction writes unless told otherwise: beside matrices, `.diff` and `.diff_b`."""
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    target = LatentDiffusionPipeline.from_pretrained(model)
    names, state = comfy_names(model, tmp_path), {}
    torch.manual_seed(4)
    for part, network in parts_of(target.components).items():
        for name, layer in network.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                continue
            theirs = names[f"{part}.{name}"]
            if layer.bias is not None:
                state[f"{theirs}.diff_b"] = torch.randn_like(layer.bias) * 0.3
                layer.bias.data += 0.7 * state[f"{theirs}.diff_b"]
            if layer.weight.ndim == 1 or name.endswith("conv_in"):
                state[f"{theirs}.diff"] = torch.randn_like(layer.weight) * 0.3
                layer.weight.data += 0.7 * state[f"{theirs}.diff"]
            elif name.endswith(ENDS):
                down, up = (
                    torch.randn(2, *layer.weight.shape[1:]),
                    torch.randn(len(layer.weight), 2),
                )
                state[f"{theirs}.lora_down.weight"] = down / down[0].numel() ** 0.5
                state[f"{theirs}.lora_up.weight"] = up.reshape(-1, 2, *[1] * (down.ndim - 2)) * 0.2
                delta = up @ down.flatten(1) * (0.2 / down[0].numel() ** 0.5)
                layer.weight.data += 0.7 * delta.reshape(layer.weight.shape)
    save_file({key: t.contiguous() for key, t in state.items()}, tmp_path / "comfy.safetensors")
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    plain, expected = output(pipeline), output(target)
    assert (plain - expected).abs().max() > 0.1
    pipeline.load_lora(tmp_path / "comfy.safetensors", 0.7)
    torch.testing.assert_close(output(pipeline), expected, rtol=1e-3, atol=1e-4)
    pipeline.fuse_lora()
    torch.testing.assert_close(output(pipeline), expected, rtol=1e-3, atol=1e-4)
    pipeline.unload_lora()
    assert torch.equal(output(pipeline), plain)
    assert all(torch.equal(v, before[k]) for k, v in pipeline.unet.state_dict().items())


@pytest.mark.parametrize("start", ("base_model.model.text_model.", "base_model.model."))
def test_the_text_tower_alone_as_peft_saves_it(model: Path, tmp_path: Path, start: str) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    changes = {n: c for n, c in make(pipeline, 1).items() if n.startswith("text_encoder.")}
    state = {}
    for name, change in changes.items():
        layer = start + name.removeprefix("text_encoder.")
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = change.down, change.up
    (tmp_path / "peft").mkdir()
    save_file(state, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 5}')
    pipeline.load_lora(tmp_path / "peft")
    found = output(pipeline)
    pipeline.unload_lora()
    pipeline.load_lora(write_lora(tmp_path / "ours.safetensors", changes))
    assert torch.equal(found, output(pipeline))


def test_learned_words_in_the_file_are_left_out_and_named(model: Path, tmp_path: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    file = write_lora(tmp_path / "a.safetensors", make(pipeline, 1), "kohya")
    pipeline.load_lora(file)
    expected = output(pipeline)
    pipeline.unload_lora()
    words = {
        "bundle_emb.cat.string_to_param.*": torch.ones(2, 24),
        "bundle_emb.dog.emb_params": torch.ones(1, 24),
    }
    save_file(load_file(file) | words, file)
    with pytest.warns(UserWarning, match="learned words .* not loaded: cat, dog"):
        pipeline.load_lora(file)
    assert torch.equal(output(pipeline), expected)
    found = dict(inspect.inspect(file))
    assert found["what"].endswith("used beside a model, with --lora FILE")
    assert found["left out"] == "learned words: cat, dog"


def refused(pipeline: LatentDiffusionPipeline, file: Path, *words: str) -> None:
    plain = output(pipeline)
    with pytest.raises(UserError) as error:
        pipeline.load_lora(file)
    for word in (str(file), *words):
        assert word in str(error.value), error.value
    assert pipeline.loras.names == {}
    assert torch.equal(output(pipeline), plain)


def test_files_for_other_models_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    changes = make(pipeline, 1)
    stray = {name.replace("blocks.0", "blocks.7"): change for name, change in changes.items()}
    strays = {name: change for name, change in stray.items() if name not in changes}
    for layout in LAYOUTS:
        file = tmp_path / f"{layout}.safetensors"
        write_lora(file, strays, layout)  # type: ignore[arg-type]
        told = "down_blocks.7" if layout == "diffusers" else "down_blocks_7"
        refused(pipeline, file, "nothing of it fits", told)
        write_lora(file, changes | strays, layout)  # type: ignore[arg-type]
        refused(pipeline, file, "not everything of it fits", told)
    wide = {
        name: LowRank(torch.randn(2, 2048), torch.randn(len(change.up), 2), 2.0)
        for name, change in changes.items()
        if name.endswith("attn2.to_k")
    }
    write_lora(tmp_path / "wide.safetensors", wide)
    refused(pipeline, tmp_path / "wide.safetensors", "(16, 24) here", "2048", "Diffusion XL")


@pytest.mark.parametrize("dora", (False, True))
def test_strengths_are_changed_without_reloading(model: Path, tmp_path: Path, dora: bool) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    before = output(pipeline)
    files = [
        write_lora(tmp_path / f"{seed}.safetensors", make(pipeline, seed, dora)) for seed in (1, 2)
    ]

    def fresh(*weights: float) -> Tensor:
        other = LatentDiffusionPipeline.from_pretrained(model)
        for file, weight in zip(files, weights, strict=True):
            other.load_lora(file, weight)
        return output(other)

    for file in files:
        pipeline.load_lora(file)
    pipeline.set_adapters(["1", "2"], [0.3, -0.5])
    assert pipeline.loras.names == {"1": 0.3, "2": -0.5}
    torch.testing.assert_close(output(pipeline), fresh(0.3, -0.5))
    pipeline.set_adapters("2")
    assert pipeline.loras.names == {"1": 0.0, "2": 1.0}
    torch.testing.assert_close(output(pipeline), fresh(0.0, 1.0))
    for names, weights, message in (
        (["1", "3"], 1.0, r"no LoRA named '3' is loaded \(1, 2\)"),
        (["1", "2"], [1.0, 2.0, 3.0], "one for each of the 2 names; got 3"),
        ("1", float("nan"), "must be a finite number"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline.set_adapters(names, weights)
    assert pipeline.loras.names == {"1": 0.0, "2": 1.0}
    pipeline.fuse_lora()
    with pytest.raises(UserError, match="fused"):
        pipeline.set_adapters("1")
    pipeline.unload_lora()
    assert torch.equal(output(pipeline), before)


def test_names(model: Path, tmp_path: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    files = [write_lora(tmp_path / f"{n}.safetensors", make(pipeline, int(n))) for n in "12"]
    pipeline.load_lora(files[0])
    with pytest.raises(UserError, match="'1' is loaded already"):
        pipeline.load_lora(files[1], name="1")
    other = write_lora(tmp_path / "other" / "1.safetensors", make(pipeline, 3))
    assert pipeline.load_lora(other) == "1-2"  # two runs' files are called the same
    pipeline.unload_lora("1-2")
    with pytest.raises(UserError, match="no LoRA named '3'"):
        pipeline.unload_lora("3")
    for wrong in ("1", float("nan"), float("inf")):
        with pytest.raises(UserError, match="must be a finite number"):
            pipeline.load_lora(files[1], wrong)  # type: ignore[arg-type]
    pipeline.load_lora(files[1])
    pipeline.fuse_lora()
    with pytest.raises(UserError, match="fused together with 2"):
        pipeline.unload_lora("1")
