"""LoRA put into a network by peft and taken out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.finetune.lora import FILE, FOLDER, KOHYA_FILE, TARGETS, Lora, LoraConfig
from latentdiff.finetune.method import Method, TextConditioned
from latentdiff.formats.folder import Components, load_components
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from tests.random_models import make_pipeline

ALL: dict[str, Any] = {"targets": tuple(TARGETS), "text_encoder": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


def output(components: Components) -> Tensor:
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = components.text_encoder.encode(["a cat", "dog"])
        return components.unet(x, torch.tensor([5, 700]), context)


def disturb(method: Method) -> None:
    torch.manual_seed(1)
    for parameter in method.trained().values():
        parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("dora", (False, True))
def test_it_starts_at_the_pretrained_model(model: Path, dora: bool) -> None:
    components = load_components(model)
    plain = output(components)
    method = Lora(components, LoraConfig(rank=3, alpha=5.0, dora=dora, **ALL))
    assert (output(components) - plain).abs().max() < 1e-6 * plain.abs().max()
    disturb(method)
    assert (output(components) - plain).abs().max() > 0.1


@pytest.mark.parametrize("dora", (False, True))
def test_the_files_and_the_fused_model_are_the_trained_network(
    model: Path, tmp_path: Path, dora: bool
) -> None:
    components = load_components(model)
    method = Lora(components, LoraConfig(rank=3, alpha=5.0, dora=dora, fuse=True, **ALL))
    disturb(method)
    trained = output(components)
    written = method.export(components, tmp_path, torch.float32)
    files = [tmp_path / FOLDER / name for name in (FILE, KOHYA_FILE)]
    assert written == [*files, tmp_path / "model"]
    scale = trained.abs().max()
    for file in files:
        pipeline = LatentDiffusionPipeline.from_pretrained(model)
        pipeline.load_lora(file)
        assert (output(pipeline.components) - trained).abs().max() < 1e-5 * scale, file
    fused = load_components(tmp_path / "model")
    assert (output(fused) - trained).abs().max() < 1e-5 * scale
    plain = load_components(model)
    assert fused.unet.state_dict().keys() == plain.unet.state_dict().keys()


def test_only_the_adapters_are_trained(model: Path) -> None:
    components = load_components(model)
    method = Lora(components, LoraConfig(rank=2))
    assert method.module is components.unet
    assert method.encode == components.text_encoder.encode
    names = list(method.trained())
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert all(".attn1.to_" in name or ".attn2.to_" in name for name in names)
    before = method.facts()
    assert before
    disturb(method)
    assert method.facts() == before, "what is trained is no fact"
    components.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    assert method.facts() != before


def test_the_text_encoder_learns_through_the_context(model: Path) -> None:
    components = load_components(model)
    plain = output(components)
    method = Lora(components, LoraConfig(rank=2, targets=(), text_encoder=True))
    assert isinstance(method.module, TextConditioned)
    ids = method.encode(["a cat", "dog"])
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    y = method.module(x, torch.tensor([5, 700]), ids)
    torch.testing.assert_close(y.detach(), plain, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    ups = [p for n, p in method.trained().items() if "lora_B" in n]
    assert ups
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ups)
    kv = method.module.project_context(ids)
    torch.testing.assert_close(method.module(x, torch.tensor([5, 700]), kv=kv), y)


def test_a_network_without_such_layers(tmp_path: Path) -> None:
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    make_pipeline(**plain, mid_block_type=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"finetune.targets=attention matches no layer"):
        Lora(load_components(tmp_path), LoraConfig())
