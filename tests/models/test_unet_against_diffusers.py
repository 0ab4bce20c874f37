"""The U-Net against diffusers' UNet2DConditionModel: same weights, same numbers."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
import torch

from latentdiff.models.unet import UNet
from tests.random_models import UNET

SD_15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD_21: dict[str, Any] = {
    "sample_size": 96,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
}
THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 8),
    "layers_per_block": (1, 2, 1),
    "transformer_layers_per_block": (1, 2, 1),
}
SMALL = {
    "custom": {},
    "fourier": {"time_embedding_type": "fourier", "flip_sin_to_cos": False},
    "three levels": THREE_LEVELS,
    "SD 2 kind": {"use_linear_projection": True, "upcast_attention": True},
    "no attention in the middle": {"mid_block_type": "UNetMidBlock2D"},
    "no middle": {"mid_block_type": None},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "pooled text": {"addition_embed_type": "text", "addition_embed_type_num_heads": 3},
    "odd time": {"time_embedding_dim": 24, "freq_shift": 1, "norm_eps": 1e-6},
}


def both_ways(fields: dict[str, Any]) -> tuple[Any, UNet]:
    """diffusers' model and ours with the same random weights, each loaded from the other."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**fields)
    with torch.device("meta"):
        ours = UNet.from_config(json.loads(theirs.to_json_string()))
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():  # norms start at 1 and biases at 0, which would hide a mix-up
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours


def inputs(width: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *size, generator=generator)
    return x, torch.tensor([3, 977]), torch.randn(2, 7, width, generator=generator)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", SMALL)
def test_small_output_and_gradients(name: str) -> None:
    theirs, ours = both_ways(UNET | SMALL[name])
    x, t, context = inputs(UNET["cross_attention_dim"], (8, 16))
    expected, found = theirs(x, t, context).sample, ours(x, t, context)
    assert relative(found, expected) < 1e-5
    expected.square().mean().backward()
    found.square().mean().backward()
    wanted, given = gradients(theirs), gradients(ours)
    assert wanted.keys() == given.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(given[key], gradient, rtol=1e-4, atol=1e-7, msg=key)
    flat = [torch.cat([g[key].flatten() for key in wanted]) for g in (given, wanted)]
    assert relative(*flat) < 1e-5


def test_sizes_that_do_not_halve_evenly() -> None:
    theirs, ours = both_ways(UNET | THREE_LEVELS)
    x, t, context = inputs(UNET["cross_attention_dim"], (10, 7))
    with torch.no_grad():
        assert relative(ours(x, t, context), theirs(x, t, context).sample) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_configuration_is_theirs(name: str) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    theirs = UNet2DConditionModel(**(UNET | SMALL[name]))
    written = UNet.from_config(json.loads(theirs.to_json_string())).config_dict()
    expected = json.loads(theirs.to_json_string())
    assert {k: v for k, v in written.items() if k != "_diffusers_version"} == {
        k: v for k, v in expected.items() if k != "_diffusers_version"
    }


@pytest.mark.slow
@pytest.mark.parametrize("fields", [SD_15, SD_21], ids=["SD 1.5", "SD 2.1"])
def test_stable_diffusion_size(fields: dict[str, Any], record_property: Any) -> None:
    theirs, ours = both_ways(fields)
    assert sum(p.numel() for p in ours.parameters()) > 850e6
    x, t, context = inputs(fields["cross_attention_dim"], (8, 8))
    with torch.no_grad():
        expected = theirs(x, t, context).sample
        del theirs
        gc.collect()
        error = relative(ours(x, t, context), expected)
    record_property("relative_error", error)
    print(f"relative error {error:.2e}")
    assert error < 1e-5
