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
    own = {"guidance_scale": sampling.guidance_scale, "chunk_tokens": sampling.chunk_tokens}
    return {key: value for key, value in own.items() if value is not None}


def with_generation(
    sampling: SamplingDefaults, data: Mapping[str, Any], where: object
) -> SamplingDefaults:
    """Take them over. Raises: UserError: a value outside its range."""
    scale, chunk = data.get("guidance_scale"), data.get("chunk_tokens")
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (number and math.isfinite(scale) and scale >= 0):
        raise UserError(f"guidance_scale in {where} must be a number of at least 0; got {scale!r}.")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise UserError(
            f"chunk_tokens in {where} must be a whole number of at least 1; got {chunk!r}."
        )
    return dataclasses.replace(
        sampling,
        guidance_scale=None if scale is None else float(scale),
        chunk_tokens=chunk,
    )
