"""Latent text-to-image diffusion: train it, use it, open it in diffusers.

Public names load when first used, so importing the package costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
    from latentdiff.errors import UserError
    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.models.clip_text import TextEncoder
    from latentdiff.models.unet import UNet
    from latentdiff.models.unet_config import UNetConfig
    from latentdiff.pipelines.embedded import pipeline
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

__version__ = "0.1.0"

# Threads spin while they wait for each other, before they sleep. Where other programs use the cores
# too, that slows an image two- to threefold; GNU OpenMP reads this as torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOME = {
    "Autoencoder": "latentdiff.models.autoencoder",
    "LatentDiffusionPipeline": "latentdiff.pipelines.generate",
    "NoiseSchedule": "latentdiff.diffusion.schedule",
    "ScheduleConfig": "latentdiff.diffusion.schedule",
    "TextEncoder": "latentdiff.models.clip_text",
    "UNet": "latentdiff.models.unet",
    "UNetConfig": "latentdiff.models.unet_config",
    "UserError": "latentdiff.errors",
    "pipeline": "latentdiff.pipelines.embedded",
}

__all__ = [
    "Autoencoder",
    "LatentDiffusionPipeline",
    "NoiseSchedule",
    "ScheduleConfig",
    "TextEncoder",
    "UNet",
    "UNetConfig",
    "UserError",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
