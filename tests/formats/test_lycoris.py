"""LyCORIS' files, against the package that writes them: read, attached at any strength, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import make_pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.formats.lora import read_lora
from latentdiff.models.low_rank import Combined, beside

lycoris = pytest.importorskip("lycoris.modules")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LohaModule", {}),
    "loha with cores": ("LohaModule", {"use_tucker": True}),
    "loha with magnitudes": ("LohaModule", {"weight_decompose": True}),
    "lokr": ("LokrModule", {}),
    "lokr of two products": ("LokrModule", {"decompose_both": True, "lora_dim": 1}),
    "lokr with a core": ("LokrModule", {"use_tucker": True}),
    "lokr of whole matrices": ("LokrModule", {"full_matrix": True}),
    "lokr with magnitudes": ("LokrModule", {"weight_decompose": True}),
    "locon with a core": ("LoConModule", {"use_tucker": True}),
}
LAYERS = {
    "linear": (nn.Linear(24, 32), (2, 24)),
    "1x1": (nn.Conv2d(24, 32, 1), (2, 24, 5, 5)),
    "3x3": (nn.Conv2d(24, 32, 3, stride=2, padding=1), (2, 24, 7, 7)),
}


def random_module(kind: str, layer: nn.Module, strength: float) -> Any:
    name, options = KINDS[kind]
    torch.manual_seed(3)
    module = getattr(lycoris, name)("x", layer, strength, **{"lora_dim": 3, "alpha": 2, **options})
    for parameter in module.parameters():
        if parameter.shape[1:].numel() == 1 and "magnitudes" in kind:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.3)
    return module


def stored(module: Any, name: str) -> dict[str, Tensor]:
    state = module.custom_state_dict() or module.state_dict()
    return {f"{name}.{key}": tensor.detach().clone().contiguous() for key, tensor in state.items()}


#: What another strength means of magnitudes is for each program to say; ours is ComfyUI's.
CASES = [(kind, s) for kind in KINDS for s in (1.0, -0.6) if s == 1 or "magnitudes" not in kind]


@pytest.mark.parametrize(("kind", "strength"), CASES)
@pytest.mark.parametrize("shape", LAYERS)
def test_a_layer_changed_by_a_file(tmp_path: Path, kind: str, shape: str, strength: float) -> None:
    layer, size = LAYERS[shape]
    module = random_module(kind, layer, strength)
    save_file(stored(module, "lora_unet_x"), tmp_path / "x.safetensors")
    (change,) = read_lora(tmp_path / "x.safetensors").weights.values()
    x = torch.randn(size)
    with torch.no_grad():
        expected = module(x)
        hook = layer.register_forward_hook(beside(change, layer, layer.weight, strength))
        found = layer(x)
        hook.remove()
        assert (found - layer(x)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_file_on_a_model_attached_fused_and_taken_off(tmp_path: Path) -> None:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

    make_pipeline().save_pretrained(tmp_path / "model")
    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    layers = dict(pipeline.unet.named_modules())
    query = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    convolution = "mid_block.resnets.0.conv1"
    norm = "mid_block.resnets.0.norm1"
    state: dict[str, Tensor] = {}
    for name, kind in ((query, "lokr"), (convolution, "loha")):
        module = random_module(kind, layers[name], 1.0)
        state |= stored(module, "lora_unet_" + name.replace(".", "_"))
    key, width = "lora_unet_" + norm.replace(".", "_"), len(layers[norm].weight)
    state |= {
        f"{key}.w_norm": torch.full((width,), 0.3),
        f"{key}.b_norm": torch.full((width,), 2.0),
    }
    save_file(state, tmp_path / "x.safetensors")
    call: Any = {"seed": 1, "num_inference_steps": 2, "output_type": "pt", "progress": False}
    before = pipeline("a cat", **call).images
    weights = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    pipeline.load_lora(tmp_path / "x.safetensors", 0.7)
    attached = pipeline("a cat", **call).images
    pipeline.fuse_lora()
    assert torch.equal(layers[norm].bias, weights[f"{norm}.bias"] + 0.7 * 2)
    fused = pipeline("a cat", **call).images
    assert (attached - before).abs().max() > 0.01
    torch.testing.assert_close(fused, attached, rtol=0, atol=1e-4)
    pipeline.unload_lora()
    assert torch.equal(pipeline("a cat", **call).images, before)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4)}, "has no hada_w2_a"),
        ({"lokr_w1": (2, 2)}, "has no lokr_w2_a"),
        (
            {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (3, 2), "hada_w2_b": (2, 4)},
            r"factors of \(4, 4\) and \(3, 4\)",
        ),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 3), "lokr_w2_b": (2, 4)}, "differ in rank"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2), "dora_scale": (1, 4)}, None),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2), "dora_scale": (1, 3)}, "per input channel"),
    ],
)
def test_factors_that_do_not_fit(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str | None
) -> None:
    state = {f"lora_unet_x.{role}": torch.ones(shape) for role, shape in tensors.items()}
    save_file(state, tmp_path / "x.safetensors")
    if message is None:
        assert isinstance(read_lora(tmp_path / "x.safetensors").weights["lora_unet_x"], Combined)
        return
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "x.safetensors")
