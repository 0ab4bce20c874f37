"""LoRA files, read and written in the two layouts that tools exchange.

    diffusers  unet.<module>.lora_A.weight .lora_B.weight .lora_magnitude_vector; α: in the header
    kohya      lora_unet_<module>.lora_down.weight .lora_up.weight .alpha .dora_scale, with _ for .

Read besides: diffusers' earlier spellings (`.lora.down`, `.processor.to_q_lora.down`,
`.lora_linear_layer.down`), peft's own files, ComfyUI's (`diffusion_model.<CompVis' module>`,
`text_encoders.clip_l.transformer.…`), and pickles of tensors. A file without alpha tensors says its
α in peft's settings, which diffusers keeps in the safetensors header and peft in a file beside.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentdiff.errors import UserError, choice_error, some
from latentdiff.files import parse_json, read_json, written_file
from latentdiff.formats.name_patterns import NamePatterns, number
from latentdiff.models.low_rank import Change, Combined, Factor, LowRank
from latentdiff.tensor_file import TensorFile, load_content, usual_file
from latentdiff.weights import refuse_not_finite, save_tensors

#: What diffusers and others look for in a folder.
FILE = "pytorch_lora_weights.safetensors"
USUAL = (FILE, "adapter_model.safetensors")
Layout = Literal["diffusers", "kohya"]
LAYOUTS = ("diffusers", "kohya")
#: The networks that a LoRA may change, as diffusers calls them.
PARTS = ("unet", "text_encoder")
#: Columns of a matrix behind the text → the model whose text states are that wide.
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
#: The header's text that diffusers writes the settings into.
ADAPTERS = "lora_adapter_metadata"
#: The largest float16. An α/r above it would overflow half precision by itself.
_LARGEST_SCALE = 65504.0

# What keys say.

_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
#: ComfyUI's start of a U-Net's names, which are CompVis'.
COMFY_UNET = "diffusion_model."
#: How the keys of learned words begin that trainers put into a LoRA file, for A1111.
BUNDLED = "bundle_emb."
#: How the names of the text tower begin: diffusers', ComfyUI's, and those of peft, which saves one
#: network alone and says not which.
_TOWER = re.compile(
    r"(text_encoder|text_encoders\.clip_[lh]\.transformer)\.(text_model\.)?|text_model\."
    r"|(?=encoder\.layers\.)"
)
#: diffusers' first spelling, whose layers are named after what is done with them.
_OLD_ATTENTION = re.compile(r"\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight$")
#: What a tensor is of its layer, by how its key ends, in everybody's words.
_ROLES = {
    "down": r"\.(?:lora_down|lora\.down|lora_linear_layer\.down|lora_A(?:\.\w+)??)\.weight$",
    "up": r"\.(?:lora_up|lora\.up|lora_linear_layer\.up|lora_B(?:\.\w+)??)\.weight$",
    "alpha": r"\.alpha$",
    "diff": r"\.diff$",
    "diff_b": r"\.diff_b$",
    "w_norm": r"\.w_norm$",
    "b_norm": r"\.b_norm$",
    "mid": r"\.lora_mid\.weight$",
    "magnitude": r"\.(?:dora_scale$|lora_magnitude_vector(?:\.|$))",
}
#: What a full-rank difference is of, by its role.
_FULL = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
#: Other ways to write a small change of a large matrix, by how the last words of a key begin; the
#: first two are read, see `_combined`.
_OTHER_ADAPTERS = {
    "hada": "a LoHa (LyCORIS)",
    "lokr": "a LoKr (LyCORIS)",
    "oft": "an OFT adapter",
    "ia3": "an IA3 adapter",
}
_READ = ("hada", "lokr")
#: One of these is in every LoHa and LoKr.
_FIRST_OF_TWO = ("hada_w1_a", "lokr_w1", "lokr_w1_a")
_OTHER_ROLE = re.compile(rf"\.(({'|'.join(_OTHER_ADAPTERS)})_\w+)")
#: LoRAs with more than we use, by a piece of their keys.
_UNSUPPORTED = {
    r"lora_B(\.\w+)?\.bias$": "its LoRA has biases, which are not supported",
    r"lora_embedding|(token|position)_embedding\.": "it changes an embedding table, which is not "
    "supported",
}
_XL = "Stable Diffusion XL"
_TRANSFORMER = "a diffusion transformer (Flux, Stable Diffusion 3 or later)"
#: Models of other families, by how a key begins; the first that any key has.
_FAMILIES = {
    r"(lora_unet_|diffusion_model\.)(double|single)_blocks[._]": "Flux",
    r"lora_transformer_|transformer\.": _TRANSFORMER,
    r"diffusion_model\.(?!input_blocks\.|middle_block\.|output_blocks\.|time_embed\.|out\.|"
    r"label_emb\.)": _TRANSFORMER,
    r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.": f"{_XL} (it has a second text encoder)",
    # Versions 1 and 2 have one block in each transformer of CompVis' names.
    r"(lora_unet_|diffusion_model\.)(input|middle|output)_block.*transformer_blocks[._][1-9]": _XL,
    r"(unet\.)?add_embedding\.|(unet\.|lora_unet_|diffusion_model\.)?label_emb[._]": _XL,
}
#: Layer → what it has, by role.
Layers = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds, before it is known which model it is for."""

    path: Path
    """Where it came from."""
    weights: dict[str, Change]
    """Changes by the layer's name: `unet.…` and `text_encoder.…` with dots, ComfyUI's
    `diffusion_model.…`, or kohya's spelling with underscores, whose dots only a model's own names
    tell."""
    whole: Layers = field(default_factory=dict)
    """Changes that are not of low rank, by layer: of its `weight`, of its `bias` (ComfyUI)."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The safetensors header's texts."""
    bundled: tuple[str, ...] = ()
    """Names of learned words in the file, which are no part of the LoRA and not read."""


def find_lora(path: str | Path) -> Path:
    """The file behind a path: itself, or the usual one in a folder. Raises: UserError: none."""
    found = Path(path).expanduser()
    if found.is_dir():
        if file := usual_file(found, USUAL):
            return file
        count = len(list(found.glob("*.safetensors")))
        raise UserError(
            f"the folder {found} holds {count} safetensors files and no {FILE}; name the LoRA file "
            "itself."
        )
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
    content, metadata = load_content(path)
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(t, Tensor) for key, t in content.items()
    ):
        raise UserError(f"{path} is no LoRA file: it holds no table of tensors.")
    state = {key: tensor for key, tensor in content.items() if not key.startswith(BUNDLED)}
    if kind := _foreign_kind(state):
        raise UserError(f"{path} cannot be used: {kind}")
    layers, unknown, twice = _by_layer(state)
    _check_complete(path, layers, unknown, twice)
    refuse_not_finite(path, {k: t for k, t in state.items() if _split_key(k)[1] != "alpha"})
    settings = _read_settings(path, metadata)
    try:
        stated = _stated_alphas(layers, settings)
        weights: dict[str, Change] = {
            name: _low_rank(name, roles, stated.get(name), _is_rslora(name, settings))
            for name, roles in layers.items()
            if "down" in roles and "mid" not in roles
        }
        for name, roles in layers.items():
            if roles.keys() & {"mid", *_FIRST_OF_TWO}:
                weights[name] = _combined(name, roles)
        whole = {
            name: found for name, roles in layers.items() if (found := _full_diffs(name, roles))
        }
    except ValueError as error:
        raise UserError(f"{path} is damaged, or a LoRA that is not supported: {error}.") from error
    return LoraFile(path, weights, whole, metadata, _bundled_words(content))


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
    about = dict(metadata or {})
    if layout == "kohya":
        about |= _kohya_facts(weights)
    else:
        about[ADAPTERS] = json.dumps(_peft_settings(weights), indent=2, sort_keys=True)
    state: dict[str, Tensor] = {}
    for name, change in weights.items():
        state |= (_kohya_keys if layout == "kohya" else _diffusers_keys)(name, change)
    # α is exact whatever the weights are stored in.
    stored = {k: _on_disk(t, None if k.endswith(".alpha") else dtype) for k, t in state.items()}
    with written_file(path) as new:
        save_tensors(stored, new, about)
    return path


def adapter_kind(names: Iterable[str]) -> str | None:
    """What tensors of these names are: a LoRA, one of its kin by name, or None: neither."""
    found = None
    for name in names:
        if kin := _OTHER_ROLE.search(name):
            return _OTHER_ADAPTERS[kin[2]]
        if _split_key(name)[1] in ("down", "diff"):
            found = "a LoRA"
    return found


def kohya_name(part: str, module: str) -> str:
    """How kohya's scripts write a layer's name."""
    return _KOHYA[part] + module.replace(".", "_")


def places(
    layers: Mapping[str, Iterable[str]], compvis: Callable[[str], str]
) -> dict[str, tuple[str, str]]:
    """Every name that a file may use → (part, module).

    Args:    layers: part → names of modules.
             compvis: a U-Net's module → its name in CompVis' code.
    """
    found: dict[str, tuple[str, str]] = {}
    for part, own in layers.items():
        for module in own:
            names = [f"{part}.{module}", kohya_name(part, module)]
            if part == "unet":
                theirs = compvis(module)
                names += [COMFY_UNET + theirs, kohya_name(part, theirs)]
            found |= dict.fromkeys(names, (part, module))
    return found


# Reading: keys → layers.


def _split_key(key: str) -> tuple[str, str | None]:
    """A key's layer name and what it is of that layer, by a word of `_ROLES` or of its kin."""
    if old := _OLD_ATTENTION.search(key):
        name, (which, role) = key[: old.start()], old.groups()
        if ".self_attn" in name:
            return f"{name}.{which}_proj", role
        return f"{name}.to_{which}" + (".0" if which == "out" else ""), role
    if kin := _OTHER_ROLE.search(key):
        return key[: kin.start()], kin[1]
    for role, pattern in _ROLES.items():
        if found := re.search(pattern, key):
            return key[: found.start()], role
    return key, None


def _normalized(name: str) -> str:
    """A layer's name with one spelling of its prefix; names of kohya and ComfyUI's U-Net stay."""
    name = name.removeprefix("base_model.model.")
    if name.startswith("lora_te1_"):  # the same tower, in files of tools that know two
        return name.replace("lora_te1_", "lora_te_", 1)
    if name.startswith(("lora_unet_", "lora_te_", COMFY_UNET, "unet.")):
        return name
    if tower := _TOWER.match(name):
        return f"text_encoder.{name[tower.end() :]}"
    return f"unet.{name}"


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[Layers, list[str], list[str]]:
    """Layers by their plain names, keys without a role, keys that repeat another."""
    layers: Layers = {}
    unknown, twice = [], []
    for key, tensor in tensors.items():
        name, role = _split_key(key)
        if role is None:
            unknown.append(key)
        elif role in (roles := layers.setdefault(_normalized(name), {})):
            twice.append(key)
        else:
            roles[role] = tensor
    return layers, unknown, twice


def _foreign_kind(keys: Collection[str]) -> str:
    """What a file with these keys is, if it is nothing for Stable Diffusion 1.x / 2.x; or ""."""
    for key in keys:
        if (found := _OTHER_ROLE.search(key)) and found[2] not in _READ:
            return f"it is {adapter_kind([key])}, not a LoRA ({key})."
    for piece, text in _UNSUPPORTED.items():
        if wrong := next((key for key in keys if re.search(piece, key)), None):
            return f"{text} ({wrong})."
    family = next((_FAMILIES[p] for p in _FAMILIES if any(re.match(p, key) for key in keys)), "")
    return family and f"it is for {family}; here Stable Diffusion 1.x / 2.x models are changed."


def _bundled_words(keys: Iterable[str]) -> tuple[str, ...]:
    """Names of the learned words that a LoRA file holds besides."""
    return tuple(dict.fromkeys(key.split(".")[1] for key in keys if key.startswith(BUNDLED)))


def _check_complete(path: Path, layers: Layers, unknown: list[str], twice: list[str]) -> None:
    """Refuse keys that make no LoRA. Raises: UserError: naming them."""
    broken = [
        name
        for name, roles in layers.items()
        if roles.keys() - _FULL.keys()
        and not {"down", "up"} <= roles.keys()
        and not roles.keys() & set(_FIRST_OF_TWO)
    ]
    if unknown and not broken and not any("lora" in key for key in unknown):
        raise UserError(
            f"{path} is no LoRA file: none of its {len(unknown)} other keys says lora (the first: "
            f"{', '.join(unknown[:3])}). A whole model is opened with --model."
        )
    kinds = {
        "keys that are no part of a LoRA": unknown,
        "layers with only half of their matrices": broken,
        "keys that repeat another": twice,
    }
    wrong = [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names]
    if wrong or not layers:
        raise UserError(
            f"{path} is damaged or of an unknown kind: {'; '.join(wrong) or 'it is empty'}."
        )


def _low_rank(
    name: str, roles: Mapping[str, Tensor], stated: float | None, rslora: bool
) -> LowRank:
    """One layer's change: α/r B A, of a rank-stabilised LoRA α/√r B A; α = r where none is stated.

    Raises: ValueError: its tensors do not make one.
    """
    down, up = roles["down"], roles["up"]
    shapes = f"the matrices of {name}, {tuple(down.shape)} and {tuple(up.shape)},"
    if not {down.ndim, up.ndim} <= {2, 4} or 0 in (*down.shape, *up.shape):
        raise ValueError(f"{shapes} are of no linear layer and no convolution")
    rank = len(down)
    if up[0].numel() != rank:
        raise ValueError(f"{shapes} differ in their rank")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{name} is of {down.dtype} and {up.dtype}, not of real numbers")
    if (own := roles.get("alpha")) is not None:
        if (alpha := _scalar(own)) is None:
            raise ValueError(
                f"the alpha of {name} is {tuple(own.shape)} of {own.dtype}, not one real number"
            )
    else:
        alpha = (float(rank) if stated is None else stated) * (rank**0.5 if rslora else 1)
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


def _combined(name: str, roles: Mapping[str, Tensor]) -> Combined:
    """One layer's change by LoHa, LoKr or LoRA with a core, as the package lycoris_lora writes it.

    Raises: ValueError: its tensors do not make one.
    """
    magnitude, alpha = roles.get("magnitude"), None
    if not all(tensor.is_floating_point() and tensor.numel() for tensor in roles.values()):
        raise ValueError(f"{name} has tensors that are empty or no real numbers")
    if "alpha" in roles and (alpha := _scalar(roles["alpha"])) is None:
        raise ValueError(f"the alpha of {name} is not one real number")
    try:
        if "mid" in roles:
            kind: Any = "core"
            up = roles["up"].flatten(1).T
            factors: tuple[Factor, ...] = (Factor(up, roles["down"].flatten(1), roles["mid"]),)
        elif "hada_w1_a" in roles:
            kind = "hadamard"
            factors = tuple(
                Factor(roles[f"hada_w{i}_a"], roles[f"hada_w{i}_b"], roles.get(f"hada_t{i}"))
                for i in (1, 2)
            )
        else:
            kind = "kronecker"
            factors = tuple(_kronecker_factor(roles, i) for i in (1, 2))
    except KeyError as error:
        raise ValueError(f"{name} has no {error.args[0]}") from error
    # Of two whole matrices there is no rank, and lycoris_lora scales by 1.
    ranks = [len(factor.down) for factor in factors if factor.down is not None]
    scale = alpha / ranks[0] if alpha is not None and ranks else 1.0
    if not abs(scale) <= _LARGEST_SCALE:
        raise ValueError(f"the alpha of {name} is {alpha:g}, too much for its rank")
    found = Combined(kind, factors, scale, None if magnitude is None else magnitude.flatten())
    out = found.shape[0]
    if magnitude is not None and magnitude.numel() != out:
        raise ValueError(f"{name} has a magnitude per input channel; only per output is supported")
    return found


def _kronecker_factor(roles: Mapping[str, Tensor], i: int) -> Factor:
    if (whole := roles.get(f"lokr_w{i}")) is not None:
        return Factor(whole)
    return Factor(roles[f"lokr_w{i}_a"], roles[f"lokr_w{i}_b"], roles.get(f"lokr_t{i}"))


def _full_diffs(name: str, roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a layer's changes that are not of low rank are of. Raises: ValueError: no numbers."""
    found = {_FULL[role]: tensor for role, tensor in roles.items() if role in _FULL}
    for of, tensor in found.items():
        if not tensor.is_floating_point():
            raise ValueError(f"the difference of {name}.{of} is {tensor.dtype}, no real numbers")
    return found


def _scalar(alpha: Tensor) -> float | None:
    """The one real number that a tensor holds; None: it holds something else."""
    return float(alpha) if alpha.numel() == 1 and not alpha.is_complex() else None


# Settings of peft, by part: {"unet.lora_alpha": 8, …}.


def _read_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the file says; empty when it does not. Raises: UserError: it is no JSON object."""
    beside = path.with_name("adapter_config.json")
    if ADAPTERS in metadata:
        return parse_json(metadata[ADAPTERS], f"{ADAPTERS} in {path}")
    if path.name.startswith("adapter_model") and beside.is_file():
        found = read_json(beside)
        return {f"{part}.{key}": value for part in PARTS for key, value in found.items()}
    return {}


def _stated_alphas(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, float]:
    """α of each layer that the settings say one for, as peft finds it.

    Raises: ValueError: a setting has no meaning, or a pattern is refused; see `NamePatterns`.
    """
    patterns = {part: NamePatterns(settings.get(f"{part}.alpha_pattern") or {}) for part in PARTS}
    found = {}
    for name in names:
        part, _, module = name.partition(".")
        if part not in PARTS:
            continue
        # transformers' tower had this prefix up to version 4; patterns were written for both.
        spellings = (f"text_model.{module}", module) if part == "text_encoder" else (module,)
        alpha = patterns[part].find(spellings)
        if alpha is None and (general := settings.get(f"{part}.lora_alpha")) is not None:
            alpha = number(general)
        if alpha is not None:
            found[name] = alpha
    return found


def _is_rslora(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a layer's change is divided by the rank's root in place of the rank."""
    return bool(settings.get(f"{name.partition('.')[0]}.use_rslora"))


def _peft_settings(weights: Mapping[str, LowRank]) -> dict[str, Any]:
    """The settings that diffusers rebuilds these adapters from, by part."""
    facts: dict[str, Any] = {}
    for part in PARTS:
        own = {n.partition(".")[2]: c for n, c in weights.items() if n.startswith(f"{part}.")}
        if not own:
            continue
        first = next(iter(own.values()))
        settings = {
            "r": first.rank,
            "lora_alpha": _as_int(first.alpha),
            "rank_pattern": {n: c.rank for n, c in own.items() if c.rank != first.rank},
            "alpha_pattern": {
                n: _as_int(c.alpha) for n, c in own.items() if c.alpha != first.alpha
            },
            "target_modules": sorted(own),
            "use_dora": any(c.magnitude is not None for c in own.values()),
        }
        facts |= {f"{part}.{key}": value for key, value in settings.items()}
    return facts


def _as_int(number: float) -> float | int:
    return int(number) if number == int(number) else number


# Writing: layers → keys.


def _on_disk(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
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
    key = kohya_name(*name.split(".", 1))
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


# Describing a LoRA, or one of its kin, which are not read.

#: Roles of tensors that change nothing alone.
_AUXILIARY = {"up", "mid", "alpha", "magnitude", *_FULL}
#: Matrices that are rank × inputs, or rank × a factor of them.
_RANK_FIRST = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
#: Keys and values of cross-attention, whose inputs are text states.
_OF_CONTEXT = re.compile(r"attn2[._]to_[kv]$")


def lora_rows(file: TensorFile) -> list[tuple[str, str]]:
    """Layout, ranks, scale, what is changed and for which model, for people."""
    layers = {n: r for n, r in _by_layer(file.tensors)[0].items() if r.keys() - _AUXILIARY}
    settings, stated = dict[str, Any](), dict[str, float]()
    # What is wrong with settings is stated by reading the file to use it; this describes the rest.
    with suppress(ValueError):
        settings = _read_settings(file.path, file.metadata)
        stated = _stated_alphas(layers, settings)
    alphas = [
        _scalar(roles["alpha"]) if "alpha" in roles else stated.get(name)
        for name, roles in layers.items()
    ]
    ranks = Counter(rank for roles in layers.values() if (rank := _rank(roles)))
    targets = sorted(Counter(map(_part, layers)).items())
    width = next((_inputs(roles) for name, roles in layers.items() if _OF_CONTEXT.search(name)), 0)
    base = BASES.get(width, f"context of {width} channels" if width else None)
    dora = any("magnitude" in roles for roles in layers.values())
    rslora = any(_is_rslora(name, settings) for name in layers)
    rows = [
        ("layout", _layout(file.tensors) + (" (DoRA)" if dora else "")),
        ("rank", ", ".join(str(rank) for rank, _ in ranks.most_common()) or "not found"),
        ("alpha", _alphas_text(alphas, rslora)),
        ("changes", ", ".join(f"{n} layers of the {p}" for p, n in targets) or "nothing known"),
        ("made for", base or "unknown: it does not touch what reads the text"),
    ]
    words = _bundled_words(file.tensors)
    return [*rows, *([("left out", f"learned words: {', '.join(words)}")] if words else [])]


def _alphas_text(alphas: list[float | None], rslora: bool) -> str:
    counts = Counter(f"{alpha:g}" for alpha in alphas if alpha is not None)
    text = ", ".join(alpha for alpha, _ in counts.most_common())
    if not text:
        text = "not stated in the file, which means alpha = rank"
    elif None in alphas:
        text += f"; {alphas.count(None)} layers say none, which means alpha = rank"
    return text + (", over the root of the rank (rank-stabilised)" if rslora else "")


def _rank(roles: Mapping[str, Tensor]) -> int | None:
    shapes = (roles[role].shape for role in _RANK_FIRST if role in roles)
    return next((int(shape[0]) for shape in shapes if shape), None)


def _inputs(roles: Mapping[str, Tensor]) -> int:
    """Columns of the matrix that is changed; 0 where they are not to be seen."""
    outer, inner = (
        next((t for end in ("", "_b") if (t := roles.get(f"lokr_w{i}{end}")) is not None), None)
        for i in (1, 2)
    )
    if outer is not None and inner is not None and min(outer.ndim, inner.ndim) > 1:
        return int(outer.shape[1] * inner.shape[1])  # of a Kronecker product
    matrices = (roles[role] for role in ("down", "hada_w1_b") if role in roles)
    return next((int(m.shape[1]) for m in matrices if m.ndim > 1), 0)


def _layout(names: Iterable[str]) -> str:
    starts = {
        "kohya": ("lora_unet_", "lora_te"),
        "peft": ("base_model.",),
        "ComfyUI": (COMFY_UNET, "text_encoders."),
    }
    found = (layout for name in names for layout in starts if name.startswith(starts[layout]))
    return next(found, "diffusers")


def _part(name: str) -> str:
    return "text encoder" if name.startswith(("lora_te", "text_encoder", "te_")) else "U-Net"
