"""The autoencoder's network: Stable Diffusion's AutoencoderKL.

    encoder: image → ResNet blocks, halving after every level but the last → mean and log-variance
    decoder: the same backwards, one more ResNet block on each level

Names and shapes are those of diffusers' class, so its weight files load. Written here: importing
that class takes longer than everything else up to the first image.

Source: Rombach et al. 2022, appendix G.2, arXiv:2112.10752 (the network is Esser et al. 2021's,
arXiv:2012.09841, with a Gaussian in place of the codebook).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.blocks import Downsample, ResnetBlock, Upsample

EPS = 1e-6
#: What diffusers takes for a key that config.json does not have.
DEFAULTS: dict[str, Any] = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "scaling_factor": 0.18215,
}


def covers(config: Mapping[str, Any]) -> bool:
    """Whether this network can stand for an AutoencoderKL of that configuration."""
    full = {**DEFAULTS, **config}
    kinds = {*full["down_block_types"], *full["up_block_types"]}
    plain = (full["act_fn"], full["in_channels"], full["out_channels"]) == ("silu", 3, 3)
    return plain and kinds == {"DownEncoderBlock2D", "UpDecoderBlock2D"}


class Attention(nn.Module):
    """Every position looks at every other one, with a single head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape, residual included."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.to_out[0](mixed).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """ResNet block, attention where configured, ResNet block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        # Registered in diffusers' order: optimizer states on disk know parameters by their number.
        resnets = [ResnetBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2)]
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(resnets)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        before, after = self.resnets
        for layer in (before, *self.attentions, after):
            x = layer(x)
        return x


class Level(nn.Module):
    """The ResNet blocks of one resolution, and the change to the next."""

    def __init__(
        self, c_in: int, c_out: int, layers: int, groups: int, change: type[nn.Module] | None
    ) -> None:
        super().__init__()
        inputs = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, c_out, groups=groups, eps=EPS) for c in inputs)
        if change is Downsample:
            self.downsamplers = nn.ModuleList([Downsample(c_out, padding=0)])
        elif change is Upsample:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        """Run everything in order."""
        for part in self.children():
            for layer in part.children():
                x = layer(x)
        return x


def _levels(widths: list[int], layers: int, groups: int, change: type[nn.Module]) -> list[Level]:
    changes = [change] * (len(widths) - 1) + [None]
    inputs = widths[:1] + widths[:-1]
    return [
        Level(c_in, c_out, layers, groups, then)
        for c_in, c_out, then in zip(inputs, widths, changes, strict=True)
    ]


class Encoder(nn.Module):
    """Image (B, 3, H, W) → (B, 2C, h, w)."""

    def __init__(self, widths: list[int], c: int, layers: int, groups: int, mid: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(_levels(widths, layers, groups, Downsample))
        self.mid_block = MidBlock(widths[-1], groups, mid)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (B, C, h, w) → image (B, 3, H, W)."""

    def __init__(self, widths: list[int], c: int, layers: int, groups: int, mid: bool) -> None:
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(c, widths[0], kernel_size=3, padding=1)
        self.up_blocks = nn.ModuleList()
        self.mid_block = MidBlock(widths[0], groups, mid)
        self.up_blocks.extend(_levels(widths, layers + 1, groups, Upsample))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Both halves, with 1×1 convolutions around the latents.

    Args: config: diffusers' config.json; kept as `config`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = {**DEFAULTS, **config}
        c = int(self.config["latent_channels"])
        widths = [int(width) for width in self.config["block_out_channels"]]
        layers, groups = int(self.config["layers_per_block"]), int(self.config["norm_num_groups"])
        mid = bool(self.config["mid_block_add_attention"])
        self.encoder = Encoder(widths, c, layers, groups, mid)
        self.decoder = Decoder(widths, c, layers, groups, mid)
        before, after = self.config["use_quant_conv"], self.config["use_post_quant_conv"]
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, kernel_size=1) if before else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, kernel_size=1) if after else nn.Identity()

    def encode(self, images: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, h, w) of images (B, 3, H, W)."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of unscaled latents (B, C, h, w)."""
        return self.decoder(self.post_quant_conv(latents))


#: Names of the attention's weights in folders written before diffusers 0.18.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the attention weights of older folders; 1×1 convolutions become matrices."""
    renamed = {}
    for name, tensor in state.items():
        head, _, last = name.rpartition(".")
        front, _, layer = head.rpartition(".")
        if ".attentions." in name:
            name = f"{front}.{_OLD.get(layer, layer)}.{last}"
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed
