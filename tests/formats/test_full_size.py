"""Stable Diffusion 1.5 and 2.1 at their size, and how much memory opening takes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentdiff.formats.folder import load_components
from latentdiff.formats.model import load_model, save_model
from tests.random_models import make_pipeline, make_text_model

#: What the published configurations of the two U-Nets say.
SIZES: dict[str, dict[str, Any]] = {
    "1.5": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "2.1": {
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
}
FULL: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


def write_full_size(folder: Path, size: dict[str, Any]) -> None:
    """A folder of a full-size U-Net in float16 and small other parts, written by diffusers."""
    width = size["cross_attention_dim"]
    text = make_text_model(hidden_size=width, hidden_act="gelu" if width == 1024 else "quick_gelu")
    pipe = make_pipeline()
    pipe.text_encoder = text
    pipe.save_pretrained(folder)
    del pipe
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**(FULL | size)).half()
    unet.load_state_dict({n: random(n, t.shape) for n, t in unet.state_dict().items()}, assign=True)
    unet.save_pretrained(folder / "unet")
    del unet
    gc.collect()


def random(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights of a size that keeps outputs of the size of inputs, from few random numbers."""
    numbers = torch.randn(65_521, generator=torch.Generator().manual_seed(len(name)))
    if len(shape) == 1:
        numbers = 1 + numbers / 10 if "norm" in name and name.endswith("weight") else numbers / 50
    else:
        numbers = numbers / shape[1:].numel() ** 0.5
    count = shape.numel()
    return numbers.half().repeat(-(-count // len(numbers)))[:count].reshape(shape)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_full_size_unet(name: str, tmp_path: Path) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    folder, file = tmp_path / "model", tmp_path / "model.safetensors"
    write_full_size(folder, SIZES[name])
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"

    # Written back bit for bit; and as one file, which diffusers reads to the same tensors.
    save_model(tmp_path / "again", load_components(folder, dtype=None))
    given, again = (load_file(f) for f in (weights, tmp_path / "again" / "unet" / weights.name))
    assert given.keys() == again.keys()
    assert all(torch.equal(given[k], again[k]) and again[k].dtype == torch.float16 for k in given)
    save_model(file, load_components(folder, dtype=None))
    read = UNet2DConditionModel.from_single_file(
        str(file), config=str(folder), subfolder="unet", torch_dtype=torch.float16
    )
    assert all(torch.equal(given[k], t) for k, t in read.state_dict().items())
    del given, again, read
    gc.collect()

    # The same output, one network in memory at a time.
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    context = torch.randn(1, 77, SIZES[name]["cross_attention_dim"])
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    expected = theirs(x, 500, context).sample
    del theirs
    gc.collect()
    for source in (folder, file):
        unet = load_model(source).unet
        found = unet(x, 500, context)
        del unet
        gc.collect()
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "file", "ckpt"])
def test_memory(form: str, tmp_path: Path) -> None:
    # A third of Stable Diffusion 1.5's U-Net: enough that the weights outweigh all else.
    from latentdiff.tensor_file import read_tensor_file

    size = SIZES["1.5"] | {"block_out_channels": (192, 384, 768, 768)}
    model = tmp_path / "model"
    write_full_size(model, size)
    if form != "folder":
        model = save_model(tmp_path / "model.safetensors", load_components(model, dtype=None))
    if form == "ckpt":  # as a folder whose U-Net is a pickle: a file's sizes need its metadata
        folder = tmp_path / "model"
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(read_tensor_file(weights).tensors, weights.with_suffix(".bin"))
        weights.unlink()
        model = folder
    for dtype, allowed in (("float16", 1.1), ("float32", 1.0 + 0.5 * 1.1)):
        before, peak, weights_size = measure(model, dtype)
        # In one's own dtype 1.1 of the weights in all; cast, the file's half of them beside.
        assert peak - before < allowed * weights_size, (dtype, (peak - before) / weights_size)


def measure(model: Path, dtype: str) -> list[int]:
    script, root = Path(__file__).with_name("loading_memory.py"), Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(model), dtype],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]
