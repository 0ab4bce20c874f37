"""The frozen autoencoder: images in [−1, 1] ↔ latents that the diffusion model works on.

The network is `vae.AutoencoderKL`, or diffusers' for AutoencoderTiny (TAESD) and for what ours does
not have; here is the one place where latents are scaled:

    latents = (raw − shift) · scale,      raw ~ N(mean, exp(logvar))

Source: Rombach et al. 2022, section 3.1 and appendix G, arXiv:2112.10752.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError, choice_error, warn
from latentdiff.files import read_json
from latentdiff.models import bands
from latentdiff.models.finite import NotFiniteError, broken_weight, check_finite, is_finite
from latentdiff.models.sizes import check_numbers
from latentdiff.models.vae import AutoencoderKL, covers, modern_names
from latentdiff.weights import VAE_STEM, load_weights, read_weights, stored_dtype

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
#: Log-variance given to an autoencoder without one; e^(−30) is no noise at all.
NO_VARIANCE = -30.0
#: Log-variances are cut off here, as in diffusers.
LOGVAR_RANGE = (-30.0, 20.0)


class Autoencoder(nn.Module):
    """An autoencoder's network with the scaling of its latents."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap our AutoencoderKL, or diffusers' AutoencoderKL or AutoencoderTiny.

        Raises: UserError: another class, or a scaling of its latents that is not supported.
        """
        super().__init__()
        self.module: Any = module
        self.dtype_on_disk: torch.dtype | None = None
        """What the weights were stored in; None: they come from no file."""
        self.slicing = False
        """Encode and decode one image at a time."""
        self.tiling = False
        """Encode and decode in bands of rows: less memory, the same pixels, slower; see `bands`."""
        self.before_use: Callable[[], None] | None = None
        """Called before the network is, to bring it where it computes."""
        config: Any = module.config
        self.kind = type(module).__name__
        if self.kind not in AUTOENCODERS:
            raise choice_error("the autoencoder's class", self.kind, AUTOENCODERS)
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise UserError(
                "this autoencoder's config.json has latents_mean or latents_std, which Stable "
                "Diffusion readers ignore. Fold them into its weights first."
            )
        levels = config["encoder_block_out_channels" if self.is_tiny else "block_out_channels"]
        self.latent_channels: int = config["latent_channels"]
        """C of the latents."""
        self.downscale: int = 2 ** (len(levels) - 1)
        """How many pixels one latent position stands for, in each direction."""
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        # A key that is left out has its class's default by now; null has no meaning.
        self.scale = 0.0 if scale is None else float(scale)
        self.shift = 0.0 if shift is None else float(shift)
        if not math.isfinite(self.scale * self.shift) or self.scale == 0:
            raise UserError(
                "the autoencoder's scaling_factor and shift_factor must be finite, and the former "
                f"not 0 (Stable Diffusion: 0.18215 and 0); got {scale!r} and {shift!r}."
            )

    @property
    def is_tiny(self) -> bool:
        """Whether this is a distilled autoencoder, which has no posterior variance."""
        return self.kind == "AutoencoderTiny"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.module.parameters()).dtype

    def config_dict(self) -> dict[str, Any]:
        """diffusers' config.json of the network."""
        public = {k: v for k, v in dict(self.module.config).items() if not k.startswith("_")}
        return {"_class_name": self.kind, **public}

    def encode_moments(self, images: Tensor) -> Tensor:
        """Posterior mean and log-variance before any scaling, which is what caches keep.

        Args:    images: (B, 3, H, W) in [−1, 1]; H and W multiples of `downscale`.
        Returns: (B, 2C, H/downscale, W/downscale) float32.
        Raises:  UserError: a size that does not divide.
        """
        self.check_image_size(tuple(images.shape[-2:]))
        return self._run("encode", images)

    def latents_from_moments(self, moments: Tensor, eps: Tensor | None = None) -> Tensor:
        """Scaled latents from what `encode_moments` gave.

        Args:    moments: (B, 2C, h, w).
                 eps: standard normal (B, C, h, w) to draw from the posterior; None: its mean.
        Returns: (B, C, h, w) float32.
        """
        raw, logvar = moments.float().chunk(2, dim=1)
        if eps is not None:
            raw = raw + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * eps
        return (raw - self.shift) * self.scale

    def encode(self, images: Tensor) -> Tensor:
        """Scaled latents of images, the mean of the posterior; images as in `encode_moments`."""
        return self.latents_from_moments(self.encode_moments(images))

    def encode_masked(self, images: Tensor, masks: Tensor) -> Tensor:
        """What an inpainting U-Net takes after x_t: the mask, and the latents of what is kept.

        As in diffusers' StableDiffusionInpaintPipeline: what is masked is grey, and each latent
        position has the mask of its first pixel.

        Args:    images: as in `encode_moments`.  masks: (B, 1, H, W), from 0.5 on it is painted.
        Returns: (B, 1 + C, h, w) float32.
        """
        painted, step = masks >= 0.5, self.downscale
        kept = self.encode(images.masked_fill(painted, 0.0))
        return torch.cat([painted[..., ::step, ::step].to(kept), kept], dim=1)

    def all_masked(self, size: tuple[int, int]) -> Tensor:
        """The same where nothing is kept, (1, 1 + C, h, w): text to image.

        Args:    size: (height, width) in pixels.
        """
        blank = torch.zeros(1, 3, *size, device=self.device)
        return self.encode_masked(blank, torch.ones_like(blank[:, :1]))

    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents.

        A decoder in 16 bit that overflows is turned to float32, and stays so, with a warning.

        Args:    latents: (B, C, h, w).
        Returns: (B, 3, h·downscale, w·downscale) float32, clamped to [−1, 1].
        Raises:  NotFiniteError: the latents or what becomes of them, with the cause.
        """
        images = self._decoded(latents)
        if is_finite(images):
            return images.clamp(-1, 1)
        if not is_finite(latents):
            raise NotFiniteError(
                "the latents to decode hold NaN or infinity, so there is no image."
            )
        if self.dtype != torch.float32 and broken_weight(self.module) is None:
            kind = str(self.dtype).removeprefix("torch.")
            warn(f"the autoencoder's decoder overflowed in {kind}; it is in float32 from here on.")
            self.module.float()
            images = self._decoded(latents)
        check_finite(images, "its pixels", "the autoencoder's decoder", self.module)
        return images.clamp(-1, 1)

    def _decoded(self, latents: Tensor) -> Tensor:
        return self._run("decode", latents / self.scale + self.shift)

    def _run(self, half: Literal["encode", "decode"], x: Tensor) -> Tensor:
        """Moments of images or images of raw latents, float32."""
        if self.before_use is not None:
            self.before_use()
        # Half precision overflows in Stable Diffusion's decoder.
        with torch.autocast(self.device.type, enabled=False):
            parts = x.to(self.device, self.dtype).split(1 if self.slicing else len(x))
            return torch.cat([self._half(half, part).float() for part in parts])

    def _half(self, half: Literal["encode", "decode"], x: Tensor) -> Tensor:
        network = getattr(self.module, half)
        if isinstance(self.module, AutoencoderKL):
            return getattr(bands, half)(self.module, x) if self.tiling else network(x)
        if not self.is_tiny:
            return network(x).sample if half == "decode" else network(x).latent_dist.parameters
        network = getattr(self.module, f"{half}r")
        decodes = half == "decode"
        scale = self.downscale if decodes else 1 / self.downscale
        answer = bands.in_bands(network, x, scale) if self.tiling else network(x)
        return (
            answer
            if decodes
            else F.pad(answer, (0,) * 5 + (self.latent_channels,), value=NO_VARIANCE)
        )

    def check_image_size(self, size: int | tuple[int, ...]) -> None:
        """Refuse an image size that the latent grid cannot hold.

        Raises: UserError: not a positive multiple of `downscale`, with the nearest that is.
        """
        for side in (size,) if isinstance(size, int) else size:
            if isinstance(side, bool) or not isinstance(side, Integral):
                raise UserError(f"image height and width must be whole numbers; got {side!r}.")
            if side < 1 or side % self.downscale:
                nearest = max(1, round(side / self.downscale)) * self.downscale
                raise UserError(
                    f"image height and width must be multiples of {self.downscale}, the "
                    f"autoencoder's downscale; got {side}. The nearest is {nearest}."
                )


def load_autoencoder(
    folder: str | Path, dtype: torch.dtype | None = torch.float32, variant: str | None = None
) -> Autoencoder:
    """Read an autoencoder from a local folder with config.json and weights.

    Args:    folder: for example `model/vae`.  dtype: of the weights in memory; None: as they are.
             variant: see `read_weights`.
    Returns: frozen, in evaluation mode.
    Raises:  UserError: folder or weights missing, unknown class, weights that do not fit.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"no autoencoder at {folder}: {file} does not exist.")
    module = empty_autoencoder(read_json(file), file)
    return fill_autoencoder(module, read_weights(file.parent, VAE_STEM, variant), folder, dtype)


def empty_autoencoder(config: Mapping[str, Any], where: str | Path) -> nn.Module:
    """Build a network whose weights take no memory yet.

    Args:    config: diffusers' config.json; where: what it was read from, for the message.
    Raises:  UserError: unknown class, or a configuration that no network has.
    """
    kind = str(config.get("_class_name", "AutoencoderKL"))
    if kind not in AUTOENCODERS:
        raise choice_error("the autoencoder's class", kind, AUTOENCODERS)
    check_numbers("the autoencoder", config)
    try:
        ours = kind == "AutoencoderKL" and covers(config)
        with torch.device("meta"):
            return AutoencoderKL(config) if ours else _from_diffusers(kind, config)
    except Exception as error:  # whatever fields of other types make of diffusers' classes
        raise UserError(f"{where} describes no autoencoder: {error}") from error


def fill_autoencoder(
    module: nn.Module, state: Mapping[str, Tensor], where: str | Path, dtype: torch.dtype | None
) -> Autoencoder:
    """Put weights into an empty network. Raises: UserError: they do not fit."""
    load_weights(module, modern_names(state), where, dtype)
    autoencoder = Autoencoder(module.eval().requires_grad_(False))
    autoencoder.dtype_on_disk = stored_dtype(state)
    return autoencoder


def _from_diffusers(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """Build with diffusers' class, which would log every field that it does not know."""
    from diffusers.utils import logging

    # From its own submodule: the package's top takes longer to import.
    module = "autoencoder_kl" if kind == "AutoencoderKL" else "autoencoder_tiny"
    network: Any = getattr(import_module(f"diffusers.models.autoencoders.{module}"), kind)
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return network.from_config(dict(config))
    finally:
        logging.set_verbosity(level)
