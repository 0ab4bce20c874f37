"""A model's own defaults of a call, kept in generation_config.json: optional, ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from latentdiff.errors import UserError
from latentdiff.formats.scheduler_config import SamplingDefaults


def generation_defaults(sampling: SamplingDefaults) -> dict[str, Any]:
    """What the file says; empty when there is nothing to say."""
    scale = sampling.guidance_scale
    return {} if scale is None else {"guidance_scale": scale}


def with_generation(
    sampling: SamplingDefaults, data: Mapping[str, Any], where: object
) -> SamplingDefaults:
    """Take them over. Raises: UserError: a value outside its range."""
    scale = data.get("guidance_scale")
    if scale is None:
        return sampling
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0:
        raise UserError(f"guidance_scale in {where} must be a number of at least 0; got {scale!r}.")
    return dataclasses.replace(sampling, guidance_scale=float(scale))
