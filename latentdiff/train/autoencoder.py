"""Training the KL autoencoder that turns images into latents.

    L = ‖x − x̂‖₁ + ‖x − x̂‖² + λ_kl KL(q(z|x) ‖ N(0, I)) + λ_p LPIPS(x, x̂) + λ_a L_adv

Source: Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn

from latentdiff.config import FREE, AtLeastOne, NotNegative, Share
from latentdiff.data.source import DataConfig
from latentdiff.models.autoencoder import LOGVAR_RANGE
from latentdiff.models.vae import AutoencoderKL
from latentdiff.train.config import RunConfig, small_loop, small_optimizer
from latentdiff.train.loop import LoopConfig
from latentdiff.train.optimizer import OptimizerConfig

#: The latent scale that Stable Diffusion 1.x readers assume when a format has no room to say it.
SD_SCALING_FACTOR = 0.18215


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the autoencoder; every level after the first halves the resolution."""

    block_out_channels: tuple[int, ...] = (32, 64, 128)
    """Channels per level; len − 1 halvings."""
    layers_per_block: AtLeastOne[int] = 1
    """ResNet blocks per level of the encoder (the decoder has one more)."""
    latent_channels: AtLeastOne[int] = 4
    """Channels of the latents."""
    norm_num_groups: AtLeastOne[int] = 8
    """Groups of every GroupNorm."""
    mid_block_attention: bool = True
    """Self-attention at the lowest resolution."""

    @property
    def downscale(self) -> int:
        """How many pixels one latent position stands for, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    def validate(self) -> list[str]:
        """List what no network has."""
        channels, groups = self.block_out_channels, self.norm_num_groups
        if channels and all(c >= 1 and c % groups == 0 for c in channels):
            return []
        return [
            f"block_out_channels must be multiples of norm_num_groups={groups}; got "
            f"{list(channels)}."
        ]


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the loss terms; means over pixels, latent dimensions or patches."""

    l1: NotNegative[float] = 1.0
    """Mean absolute error."""
    mse: NotNegative[float] = 1.0
    """Mean squared error."""
    kl: NotNegative[float] = 1e-3
    """KL to N(0, I) per latent dimension, in nats; larger gives smoother latents."""
    perceptual: NotNegative[float] = 0.0
    """LPIPS (needs stlpips-pytorch); 0 is off."""
    perceptual_stages: Annotated[int, Interval(ge=1, le=5)] = 3
    """VGG stages in LPIPS, 1 to 5."""
    adversarial: NotNegative[float] = 0.0
    """Patch discriminator; 0 is off."""
    late_start: Share = 0.7
    """Share of the steps after which the perceptual and adversarial terms start."""


@dataclass(frozen=True)
class AutoencoderTrainConfig(RunConfig):
    """Everything that train_autoencoder.py needs."""

    output: str = field(default="runs/autoencoder", metadata=FREE)
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, vae/."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """The network."""
    crop_size: int | None = None
    """Train on squares of this many pixels, cut out of the data.image_size images at random: the
    network is convolutional, and a small square costs less. null trains on whole images."""
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    """The loss."""
    preload: bool = False
    """Decode every image once, before the first step, into memory (of the GPU if there is one):
    3 · size² bytes each, on every process. A GPU waits for decoding otherwise."""
    optimizer: OptimizerConfig = field(default_factory=lambda: small_optimizer((0.9, 0.99)))
    """AdamW and its learning rate."""
    loop: LoopConfig = field(default_factory=small_loop)
    """Length, batches and cadence."""

    def validate(self) -> list[str]:
        """List what does not go together."""
        problems = []
        if self.preload and self.data.crop == "random":
            problems.append(
                "preload keeps one crop of every image; set data.crop=center, or preload=false."
            )
        unit, largest = self.autoencoder.downscale, self.data.image_size
        if self.crop_size is not None and (
            not unit <= self.crop_size <= largest or self.crop_size % unit
        ):
            problems.append(
                f"crop_size must be a multiple of {unit}, the autoencoder's downscale, and at most "
                f"data.image_size={largest}, or null; got {self.crop_size}."
            )
        return problems


def build_autoencoder(config: AutoencoderConfig, sample_size: int) -> AutoencoderKL:
    """Make an untrained autoencoder of the given shape."""
    levels = len(config.block_out_channels)
    vae = AutoencoderKL(
        {
            "block_out_channels": list(config.block_out_channels),
            "layers_per_block": config.layers_per_block,
            "latent_channels": config.latent_channels,
            "norm_num_groups": config.norm_num_groups,
            "mid_block_add_attention": config.mid_block_attention,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "sample_size": sample_size,
            "scaling_factor": SD_SCALING_FACTOR,
        }
    )
    # Every residual branch starts at zero (arXiv:1901.09321) and every convolution between them
    # orthogonal (arXiv:1312.6120): the network begins linear, and images and gradients keep their
    # size through its ten or twenty layers, where torch's default divides it by √3 in each.
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith(".conv1"):
            (nn.init.zeros_ if name.endswith(".conv2") else nn.init.orthogonal_)(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    assert isinstance(vae.quant_conv, nn.Conv2d) and vae.quant_conv.bias is not None
    # Start with σ = e⁻², not 1, so that the decoder sees the image from the first step.
    nn.init.zeros_(vae.quant_conv.weight[config.latent_channels :])
    nn.init.constant_(vae.quant_conv.bias[config.latent_channels :], -4.0)
    return vae


class AutoencoderPass(nn.Module):
    """One forward pass in training: image → posterior → sampled latent → image."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (reconstruction, mean, log-variance); z = μ + σ ε."""
        mean, logvar = posterior(self.vae, images)
        latents = mean + (0.5 * logvar).exp() * eps.to(mean.dtype)
        return self.vae.decode(latents).float(), mean, logvar


def posterior(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (B, C, h, w) of images' latents, the latter in −30 … 20."""
    mean, logvar = vae.encode(images).chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def kl_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) in nats, averaged over batch and dimensions (arXiv:1312.6114)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over a data set, with its own noise."""
    count = 0
    total = squares = torch.zeros(())
    for images in batches:
        mean, logvar = posterior(vae, images)
        mean, var = mean.double(), logvar.double().exp()
        count += mean.numel() // mean.shape[1]
        total = total + mean.sum((0, 2, 3))
        squares = squares + (mean**2 + var).sum((0, 2, 3))
    average = total / count
    return average.float(), (squares / count - average**2).sqrt().float()


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Standardise the latents inside the weights, so that one scalar is all that is left.

    Afterwards `scaling_factor · raw` has mean 0 and variance 1 in every channel, with the scaling
    factor that Stable Diffusion readers assume:  z' = (z − m) / (s · f), in the 1×1 convolutions
    before and after the bottleneck, so every reader of the folder gets it with no extra field.
    """
    factor = float(vae.config["scaling_factor"])
    spread = std * factor
    channels = len(mean)
    before: Any = vae.quant_conv
    after: Any = vae.post_quant_conv
    before.weight[:channels] /= spread[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / spread
    before.bias[channels:] -= 2 * spread.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= spread[None, :, None, None]


def psnr(images: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB per image for values in [−1, 1].

    Args:
        images, targets: (B, 3, H, W).
        mask: (B, 1, H, W), 1 where pixels count; None counts all.
    """
    squares = (images - targets).float() ** 2 / 4
    if mask is None:
        error = squares.mean((1, 2, 3))
    else:
        error = (squares * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * 3).clamp_min(1)
    return -10 / math.log(10) * error.clamp_min(1e-12).log()
