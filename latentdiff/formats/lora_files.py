"""LoRA files, read and written in the two layouts that tools exchange.

    diffusers  unet.<module>.lora_A.weight .lora_B.weight .lora_magnitude_vector; α: in the header
    kohya      lora_unet_<module>.lora_down.weight .lora_up.weight .alpha .dora_scale, with _ for .

Read besides: diffusers' earlier spellings (`.lora.down`, `.processor.to_q_lora.down`,
`.lora_linear_layer.down`), peft's own files, and pickles of tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentdiff.errors import UserError, choice_error
from latentdiff.formats.lora_names import foreign_kind, kohya_name, plain_name, split_key
from latentdiff.formats.lora_settings import ADAPTERS, adapter_settings, alpha_of, settings_for
from latentdiff.models.low_rank import LowRank
from latentdiff.tensor_file import load_content
from latentdiff.weight_files import save_tensors

#: What diffusers and others look for in a folder.
FILE = "pytorch_lora_weights.safetensors"
USUAL = (FILE, "adapter_model.safetensors")
LAYOUTS = ("diffusers", "kohya")
Layout = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds, before it is known which model it is for."""

    path: Path
    """Where it came from."""
    weights: dict[str, LowRank]
    """Changes by the layer's name: `unet.…` and `text_encoder.…` with dots, or kohya's spelling
    with underscores, whose dots only a model's own names tell."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The safetensors header's texts."""

    @property
    def layout(self) -> Layout:
        """diffusers or kohya."""
        return "kohya" if any(name.startswith("lora_") for name in self.weights) else "diffusers"


def find_lora(path: str | Path) -> Path:
    """The file behind a path: itself, or the usual one in a folder. Raises: UserError: none."""
    found = Path(path).expanduser()
    if found.is_dir():
        candidates = [found / name for name in USUAL]
        files = [f for f in candidates if f.is_file()] or sorted(found.glob("*.safetensors"))
        if len(files) == 0 or (len(files) > 1 and files[0] not in candidates):
            raise UserError(
                f"the folder {found} holds {len(files)} safetensors files and no {FILE}; name the "
                "LoRA file itself."
            )
        return files[0]
    if not found.is_file():
        raise UserError(f"no LoRA file at {found}.")
    return found


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA file of either layout, in the number format it has.

    Args:    path: .safetensors, a pickle of tensors, or a folder with one.
    Raises:  UserError: missing, damaged, another kind of adapter, or keys that belong together
             and are not together, each named.
    """
    path = find_lora(path)
    state, metadata = _read(path)
    if kind := foreign_kind(state):
        raise UserError(f"{path} cannot be used: {kind}")
    pieces: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        name, role = split_key(key)
        if role is None:
            unknown.append(key)
        else:
            pieces.setdefault(plain_name(name), {})[role] = tensor
    broken = [name for name, roles in pieces.items() if not {"down", "up"} <= set(roles)]
    if unknown or broken or not pieces:
        raise UserError(_not_lora(path, unknown, broken))
    try:
        adapters = adapter_settings(path, metadata)
        weights = {name: _change(name, roles, adapters) for name, roles in pieces.items()}
    except UserError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError, re.error) as error:
        raise UserError(
            f"{path} is damaged, or no LoRA file: a shape, alpha or setting in it has no meaning "
            f"({error}). Get it again."
        ) from error
    return LoraFile(path, weights, metadata)


def write_lora(
    path: Path,
    weights: Mapping[str, LowRank],
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write changes by layer name (`unet.…`, `text_encoder.…`, with dots).

    Args:    dtype: on disk; None: as the tensors are.
             metadata: texts for the header, beside those that say α and rank.
    Returns: the file.
    Raises:  UserError: an unknown layout, or the file cannot be written; an older one is as it was.
    """
    if layout not in LAYOUTS:
        raise choice_error("layout", layout, LAYOUTS)
    about = {"format": "pt", **(metadata or {})}
    if layout == "kohya":
        about |= _kohya_facts(weights)
    else:
        about[ADAPTERS] = json.dumps(settings_for(weights), indent=2, sort_keys=True)
    state: dict[str, Tensor] = {}
    for name, change in weights.items():
        state |= (_kohya_keys if layout == "kohya" else _diffusers_keys)(name, change)
    # α is exact whatever the weights are stored in.
    stored = {k: _stored(t, None if k.endswith(".alpha") else dtype) for k, t in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        save_tensors(stored, partial, about)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}).") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    state, metadata = load_content(path)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} is no LoRA file: it holds no table of tensors.")
    return state, metadata


def _change(name: str, roles: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> LowRank:
    rank = len(roles["down"])
    alpha = float(roles["alpha"]) if "alpha" in roles else alpha_of(name, rank, adapters)
    magnitude = roles.get("magnitude")
    if magnitude is not None and magnitude.numel() != len(roles["up"]):
        raise UserError(
            f"{name} has a DoRA magnitude per input channel; only per output channel is supported."
        )
    return LowRank(
        roles["down"], roles["up"], alpha, None if magnitude is None else magnitude.flatten()
    )


def _not_lora(path: Path, unknown: list[str], broken: list[str]) -> str:
    if len(unknown) and not broken and not any("lora" in key for key in unknown):
        return (
            f"{path} is no LoRA file: none of its {len(unknown)} other keys says lora (the first: "
            f"{', '.join(unknown[:3])}). A whole model is opened with --model."
        )
    texts = []
    if unknown:
        texts.append(f"{len(unknown)} keys that are no part of a LoRA: {some(unknown)}")
    if broken:
        texts.append(f"{len(broken)} layers with only half of their matrices: {some(broken)}")
    return f"{path} is damaged or of an unknown kind: {'; '.join(texts) or 'it is empty'}."


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    # Copies: safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()


def _diffusers_keys(name: str, change: LowRank) -> dict[str, Tensor]:
    name = name.replace("text_encoder.", "text_encoder.text_model.", 1)
    state = {f"{name}.lora_A.weight": change.down, f"{name}.lora_B.weight": change.up}
    if change.magnitude is not None:  # peft: (out,), of a convolution (1, out, 1, 1)
        shape = (-1,) if change.up.ndim == 2 else (1, -1, 1, 1)
        state[f"{name}.lora_magnitude_vector"] = change.magnitude.reshape(shape)
    return state


def _kohya_keys(name: str, change: LowRank) -> dict[str, Tensor]:
    part, _, module = name.partition(".")
    key = kohya_name(part, module)
    state = {f"{key}.lora_down.weight": change.down, f"{key}.lora_up.weight": change.up}
    state[f"{key}.alpha"] = torch.tensor(float(change.alpha))
    if change.magnitude is not None:
        state[f"{key}.dora_scale"] = change.magnitude.reshape(-1, *[1] * (change.up.ndim - 1))
    return state


def _kohya_facts(weights: Mapping[str, LowRank]) -> dict[str, str]:
    first = next(iter(weights.values()))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": f"{first.alpha:g}",
    }
