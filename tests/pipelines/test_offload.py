"""Model offload: the same images, with one part at a time on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from latentdiff.errors import UserError
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from tests.random_models import make_pipeline

CALL: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "output_type": "pt", "progress": False}
DEVICE = torch.device("cpu", 0)


@pytest.fixture
def pipeline(tmp_path: Path) -> LatentDiffusionPipeline:
    make_pipeline().save_pretrained(tmp_path)
    return LatentDiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("task", ["draw", "edit", "invert"])
def test_parts_take_turns_on_the_device(
    pipeline: LatentDiffusionPipeline, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is a name for the CPU here; who computes is looked at from outside."""
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")

    def run() -> torch.Tensor:
        if task == "draw":
            return pipeline("a cat", **CALL, num_images_per_prompt=2, batch_size=1).images
        if task == "edit":
            return pipeline.image_to_image("a cat", image, 0.9, **CALL).images
        return pipeline.invert(image, "a cat", num_inference_steps=2).latents

    expected = run()
    parts: dict[str, nn.Module] = {
        "text": pipeline.text_encoder, "unet": pipeline.unet, "vae": pipeline.autoencoder
    }  # fmt: skip
    names = {id(module): name for name, module in parts.items()}
    here: set[str] = set()
    used: list[str] = []
    move = nn.Module.to

    def to(self: nn.Module, device: Any = None, *args: Any, **more: Any) -> nn.Module:
        if name := names.get(id(self)):
            (here.add if device == DEVICE else here.discard)(name)
        return move(self, device, *args, **more)

    def computes(name: str) -> Any:
        def hook(*_: Any) -> None:
            assert here == {name}
            used.append(name)

        return hook

    monkeypatch.setattr(nn.Module, "to", to)
    pipeline.enable_model_cpu_offload(DEVICE)
    for name, inner in {
        "text": pipeline.text_encoder.module, "unet": pipeline.unet,
        "vae": pipeline.autoencoder.module.encoder,
    }.items():  # fmt: skip
        inner.register_forward_pre_hook(computes(name))
    pipeline.autoencoder.module.decoder.register_forward_pre_hook(computes("vae"))
    assert pipeline.device == DEVICE
    assert torch.equal(run(), expected)
    assert set(used) == set(parts)
    pipeline.to("cpu")
    assert pipeline.device == torch.device("cpu")
    assert pipeline.text_encoder.before_use is pipeline.autoencoder.before_use is None


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_machine_without_another_device_says_so(pipeline: LatentDiffusionPipeline) -> None:
    with pytest.raises(UserError, match="needs another device than the CPU"):
        pipeline.enable_model_cpu_offload()
