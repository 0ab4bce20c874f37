"""peft's settings, from which a LoRA file without alpha tensors says its α.

diffusers keeps them in the safetensors header, peft in a file beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError
from latentdiff.formats.lora_names import PARTS
from latentdiff.formats.name_patterns import NamePatterns, number
from latentdiff.models.low_rank import LowRank

#: The header's text that diffusers writes the settings into.
ADAPTERS = "lora_adapter_metadata"


def adapter_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings by part: {"unet.lora_alpha": 8, …}; empty when the file does not say.

    Raises:  UserError: they are no JSON object.
    """
    beside = path.with_name("adapter_config.json")
    try:
        if ADAPTERS in metadata:
            return _settings(path, metadata[ADAPTERS])
        if path.name.startswith("adapter_model") and beside.is_file():
            found = _settings(beside, beside.read_text(encoding="utf-8"))
            return {f"{part}.{key}": value for part in PARTS for key, value in found.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"the adapter settings of {path} are damaged: {error}") from error
    return {}


def _settings(where: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"the JSON in {where.name} is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where.name} should hold a JSON object there, not {text[:40]}")
    return found


def said_alphas(names: Iterable[str], adapters: Mapping[str, Any]) -> dict[str, float]:
    """α of each layer that the settings say one for, as peft finds it.

    Raises: ValueError: a setting has no meaning, or a pattern is refused; see `NamePatterns`.
    """
    patterns = {part: NamePatterns(adapters.get(f"{part}.alpha_pattern") or {}) for part in PARTS}
    found = {}
    for name in names:
        part, _, module = name.partition(".")
        if part not in PARTS:
            continue
        # transformers' tower had this prefix up to version 4; patterns were written for both.
        spellings = (f"text_model.{module}", module) if part == "text_encoder" else (module,)
        alpha = patterns[part].find(spellings)
        if alpha is None and (general := adapters.get(f"{part}.lora_alpha")) is not None:
            alpha = number(general)
        if alpha is not None:
            found[name] = alpha
    return found


def effective_alpha(said: float | None, name: str, rank: int, adapters: Mapping[str, Any]) -> float:
    """α of a layer whose change is α/r B A, from the α that is said; None: the rank.

    A rank-stabilised LoRA's change is α/√r B A.
    """
    alpha = float(rank) if said is None else said
    return alpha * rank**0.5 if is_stabilised(name, adapters) else alpha


def is_stabilised(name: str, adapters: Mapping[str, Any]) -> bool:
    """Whether a layer's change is divided by the rank's root in place of the rank."""
    return bool(adapters.get(f"{name.partition('.')[0]}.use_rslora"))


def settings_for(weights: Mapping[str, LowRank]) -> dict[str, Any]:
    """The settings that diffusers rebuilds these adapters from, by part."""
    facts: dict[str, Any] = {}
    for part in PARTS:
        own = {n.partition(".")[2]: c for n, c in weights.items() if n.startswith(f"{part}.")}
        if not own:
            continue
        first = next(iter(own.values()))
        ranks = {n: c.rank for n, c in own.items() if c.rank != first.rank}
        alphas = {n: _whole(c.alpha) for n, c in own.items() if c.alpha != first.alpha}
        settings = {
            "r": first.rank,
            "lora_alpha": _whole(first.alpha),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "target_modules": sorted(own),
            "use_dora": any(c.magnitude is not None for c in own.values()),
        }
        facts |= {f"{part}.{key}": value for key, value in settings.items()}
    return facts


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
