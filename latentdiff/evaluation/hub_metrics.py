"""The field's standard distances, with networks that a machine may or may not have.

Weights are looked for in the local Hugging Face and torch caches only; nothing is downloaded. A
metric whose weights are not there is reported as not measured, with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.evaluation.features import to_tensors
from latentdiff.evaluation.measures import Shown
from latentdiff.evaluation.statistics import frechet_distance, rbf_distance

DINO = "facebook/dinov2-large"
CLIP = "openai/clip-vit-large-patch14-336"
#: Normalisation of the two: ImageNet's for DINOv2, CLIP's own.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def hub_metrics(pages: Sequence[Shown], device: torch.device) -> dict[str, Any]:
    """FID (Inception), FD-DINOv2 and CMMD of generated against real pictures.

    Source: arXiv:1706.08500, arXiv:2306.04675, arXiv:2401.09603.
    """
    ours = [item.ours for item in pages if item.real is not None]
    theirs = [item.real for item in pages if item.real is not None]
    figures: dict[str, Any] = {}
    for name, open_network, distance in (
        ("FID (Inception)", _inception, frechet_distance),
        ("FD-DINOv2", _dino, frechet_distance),
        ("CMMD", _clip, rbf_distance),
    ):
        try:
            network = open_network(device)
        except (OSError, ImportError, ValueError) as error:
            reason = str(error).splitlines()[0]
            figures[name] = f"not measured: {reason:.120}"
            continue
        figures[name] = distance(features(ours, network), features(theirs, network))
    return figures


@torch.no_grad()
def features(images: Sequence[Image.Image], network: Callable[..., Tensor]) -> Tensor:
    """Features of pictures in batches of 16."""
    parts = [network(images[i : i + 16]).float().cpu() for i in range(0, len(images), 16)]
    return torch.cat(parts)


def _normalised(images: Sequence[Image.Image], side: int, how: Any, device: Any) -> Tensor:
    mean, spread = (torch.tensor(values)[:, None, None] for values in how)
    return ((to_tensors(images, side) / 2 + 0.5 - mean) / spread).to(device)


def _dino(device: torch.device, folder: str = DINO) -> Callable[..., Tensor]:
    from transformers import AutoModel

    net = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)

    def network(images: Sequence[Image.Image]) -> Tensor:
        states = net(pixel_values=_normalised(images, 224, _IMAGENET, device)).last_hidden_state
        return states[:, 0]

    return network


def _clip(device: torch.device, folder: str = CLIP) -> Callable[..., Tensor]:
    from transformers import CLIPVisionModelWithProjection

    net = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
    net = net.float().eval().to(device)
    side = net.config.image_size

    def network(images: Sequence[Image.Image]) -> Tensor:
        return net(pixel_values=_normalised(images, side, _CLIP, device)).image_embeds

    return network


def _inception(device: torch.device) -> Callable[..., Tensor]:
    if importlib.util.find_spec("pytorch_fid") is None:
        raise ImportError("the PyPI package pytorch-fid is not installed")
    import os

    from pytorch_fid import inception

    name = str(inception.FID_WEIGHTS_URL).rsplit("/", 1)[-1]
    if not os.path.isfile(os.path.join(torch.hub.get_dir(), "checkpoints", name)):
        raise OSError(f"{name} is not in the torch hub cache")
    net = inception.InceptionV3([3]).eval().to(device)

    def network(images: Sequence[Image.Image]) -> Tensor:
        pixels = to_tensors(images, images[0].width).to(device) / 2 + 0.5
        return F.adaptive_avg_pool2d(net(pixels)[0], 1).flatten(1)

    return network
