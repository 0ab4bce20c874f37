"""LoRA files, read and written in the two layouts that tools exchange.

    diffusers  unet.<module>.lora_A.weight .lora_B.weight .lora_magnitude_vector; α: in the header
    kohya      lora_unet_<module>.lora_down.weight .lora_up.weight .alpha .dora_scale, with _ for .

Read besides: diffusers' earlier spellings (`.lora.down`, `.processor.to_q_lora.down`,
`.lora_linear_layer.down`), peft's own files, ComfyUI's (`diffusion_model.<CompVis' module>`,
`text_encoders.clip_l.transformer.…`), and pickles of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentdiff.errors import UserError, choice_error
from latentdiff.formats.lora_names import (
    BUNDLED,
    bundled_words,
    foreign_kind,
    kohya_name,
    plain_name,
    split_key,
)
from latentdiff.formats.lora_settings import (
    ADAPTERS,
    adapter_settings,
    effective_alpha,
    said_alphas,
    settings_for,
)
from latentdiff.models.low_rank import LowRank
from latentdiff.tensor_file import load_content, refuse_not_finite
from latentdiff.weight_files import save_tensors

#: What diffusers and others look for in a folder.
FILE = "pytorch_lora_weights.safetensors"
USUAL = (FILE, "adapter_model.safetensors")
LAYOUTS = ("diffusers", "kohya")
#: The largest float16. An α/r above it would overflow half precision by itself.
_LARGEST_SCALE = 65504.0
Layout = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds, before it is known which model it is for."""

    path: Path
    """Where it came from."""
    weights: dict[str, LowRank]
    """Changes by the layer's name: `unet.…` and `text_encoder.…` with dots, ComfyUI's
    `diffusion_model.…`, or kohya's spelling with underscores, whose dots only a model's own names
    tell."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The safetensors header's texts."""
    bundled: tuple[str, ...] = ()
    """Names of learned words in the file, which are no part of the LoRA and not read."""

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
    Raises:  UserError: missing, damaged, another kind of adapter, keys that belong together and
             are not together, or numbers that are not finite, each named.
    """
    path = find_lora(path)
    state, metadata = _read(path)
    bundled = bundled_words(state)
    state = {key: tensor for key, tensor in state.items() if not key.startswith(BUNDLED)}
    if kind := foreign_kind(state):
        raise UserError(f"{path} cannot be used: {kind}")
    pieces = _pieces(path, state)
    refuse_not_finite(path, {k: t for k, t in state.items() if split_key(k)[1] != "alpha"})
    adapters = adapter_settings(path, metadata)
    try:
        said = said_alphas(pieces, adapters)
        weights = {
            name: _change(name, roles, said.get(name), adapters) for name, roles in pieces.items()
        }
    except ValueError as error:
        raise UserError(f"{path} is damaged, or a LoRA that is not supported: {error}.") from error
    return LoraFile(path, weights, metadata, bundled)


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
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(t, Tensor) for key, t in state.items()
    ):
        raise UserError(f"{path} is no LoRA file: it holds no table of tensors.")
    return state, metadata


def _pieces(path: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer → what it has, by role. Raises: UserError: a key has no role, or a layer lacks one."""
    pieces: dict[str, dict[str, Tensor]] = {}
    unknown, twice = [], []
    for key, tensor in state.items():
        name, role = split_key(key)
        if role is None:
            unknown.append(key)
        elif role in (roles := pieces.setdefault(plain_name(name), {})):
            twice.append(key)
        else:
            roles[role] = tensor
    broken = [name for name, roles in pieces.items() if not {"down", "up"} <= set(roles)]
    if unknown or broken or twice or not pieces:
        raise UserError(_not_lora(path, unknown, broken, twice))
    return pieces


def _change(
    name: str, roles: Mapping[str, Tensor], said: float | None, adapters: Mapping[str, Any]
) -> LowRank:
    """One layer's change. Raises: ValueError: its tensors do not make one."""
    down, up = roles["down"], roles["up"]
    shapes = f"the matrices of {name}, {tuple(down.shape)} and {tuple(up.shape)},"
    if not {down.ndim, up.ndim} <= {2, 4} or 0 in (*down.shape, *up.shape):
        raise ValueError(f"{shapes} are of no linear layer and no convolution")
    rank = len(down)
    if up[0].numel() != rank:
        raise ValueError(f"{shapes} differ in their rank")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{name} is of {down.dtype} and {up.dtype}, not of real numbers")
    if "alpha" in roles:
        alpha = _one_number(roles["alpha"], f"the alpha of {name}")
    else:
        alpha = effective_alpha(said, name, rank, adapters)
    if not abs(alpha / rank) <= _LARGEST_SCALE:  # nor is NaN
        raise ValueError(
            f"the alpha of {name} is {alpha:g}; over the rank it can be at most {_LARGEST_SCALE:g}"
        )
    magnitude = roles.get("magnitude")
    if magnitude is not None and magnitude.numel() != len(up):
        raise ValueError(
            f"{name} has a DoRA magnitude per input channel; only per output channel is supported"
        )
    return LowRank(down, up, alpha, None if magnitude is None else magnitude.flatten())


def _one_number(tensor: Tensor, what: str) -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        raise ValueError(f"{what} is {tuple(tensor.shape)} of {tensor.dtype}, not one real number")
    return float(tensor)


def _not_lora(path: Path, unknown: list[str], broken: list[str], twice: list[str]) -> str:
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
    if twice:
        texts.append(f"{len(twice)} keys that say again what another says: {some(twice)}")
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
