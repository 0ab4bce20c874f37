"""LoRA files on a model that generates: attached beside its weights, added to them, taken off.

Attached (unfused), a file is a hook on each layer: W x + s ΔW x. Strengths can be changed and files
removed, the weights and their names stay the model's own. Fused, s ΔW is in the weights: nothing
is left to compute, and what was there is kept for going back to the bit.
Every change is one of the model's own weights W, also where several files change the same layer:
W' = W + Σ s_k ΔW_k, so the order does not matter and fused equals attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from latentdiff.errors import UserError, some, warn
from latentdiff.formats.key_map import unet_names
from latentdiff.formats.lora import BASES, LoraFile, places, read_lora
from latentdiff.models.low_rank import (
    Change,
    Difference,
    add_to,
    beside,
    fits,
    layers_of,
    norms_of,
)
from latentdiff.pipelines.hashes import file_hash
from latentdiff.pipelines.inputs import FINITE, is_number

if TYPE_CHECKING:
    from latentdiff.formats.folder import Components

#: (part, module name), for example ("unet", "mid_block.attentions.0.proj_in").
Place = tuple[str, str]


@dataclass
class _Loaded:
    """One file on the model."""

    changes: dict[Place, Change]
    whole: dict[Place, dict[str, Tensor]]
    strength: float
    file: str
    hash: str
    hooks: list[Any] = field(default_factory=list)


class Loras:
    """The LoRA files of one pipeline.

    Args:    parts: the networks by the names that files use: unet, text_encoder.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = dict(parts)
        self._loaded: dict[str, _Loaded] = {}
        self._before: dict[tuple[Place, str], Tensor] = {}

    @property
    def names(self) -> dict[str, float]:
        """The files on the model and their strengths, in the order of loading."""
        return {name: one.strength for name, one in self._loaded.items()}

    def records(self) -> list[dict[str, Any]]:
        """The files on the model as `settings` records them."""
        return [
            {"name": name, "file": one.file, "weight": one.strength, "hash": one.hash}
            for name, one in self._loaded.items()
        ]

    @property
    def attached(self) -> bool:
        """Whether some file is not fused."""
        return any(one.hooks for one in self._loaded.values())

    def check_saved(self) -> None:
        """Raises: UserError: some file would be missing from weights that are saved now."""
        if self.attached:
            raise UserError(
                f"the LoRA files {', '.join(self.names)} are attached and no part of the weights. "
                "Call fuse_lora() to save the model with them, or unload_lora() first."
            )

    def load(self, path: str | Path, weight: float = 1.0, name: str | None = None) -> str:
        """Attach a file; other files stay.

        Args:    path: see `read_lora`.  weight: strength; 1 as trained, 0 none.
                 name: to unload it by; None: the file's, with a number where it is taken.
        Returns: its name. Warns of learned words in the file, which are left out.
        Raises:  UserError: the file is not for this model, or the name is taken; nothing changes.
        """
        if not is_number(weight, most=FINITE):
            raise UserError(f"the weight of a LoRA must be a finite number; got {weight!r}.")
        file = read_lora(path)
        if name is None:  # most files are called pytorch_lora_weights
            stem, more = file.path.stem, 2
            name = stem
            while name in self._loaded:
                name, more = f"{stem}-{more}", more + 1
        if name in self._loaded:
            raise UserError(
                f"a LoRA named {name!r} is loaded already; unload it first, or give this one "
                "another name."
            )
        one = _Loaded(
            *match(file, self._parts), float(weight), str(path), file_hash(file.path)[:10]
        )
        if file.bundled:
            warn(
                f"{file.path} holds learned words besides its LoRA, which are not loaded: "
                f"{some(file.bundled)}. Words are loaded from files of their own."
            )
        self._attach(one)
        self._loaded[name] = one
        return name

    def _attach(self, one: _Loaded) -> None:
        for place, change in one.changes.items():
            layer = self._layer(place)
            own = self._before.get((place, "weight"), layer.weight)
            hook = beside(change, layer, own, one.strength)
            one.hooks.append(layer.register_forward_hook(hook))
        for place, changes in one.whole.items():
            difference = Difference(changes, one.strength)
            one.hooks.append(self._layer(place).register_forward_hook(difference))

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Give the files these strengths; the others are off (0) and stay loaded.

        Raises: UserError: no such file, no finite number, or files are fused; nothing changes.
        """
        for name, strength in strengths.items():
            self._check_loaded(name)
            if not is_number(strength, most=FINITE):
                raise UserError(f"the weight of {name} must be a finite number; got {strength!r}.")
        if any(not one.hooks for one in self._loaded.values()):
            raise UserError("fused LoRA files have their strength for good; unload_lora() first.")
        for name, one in self._loaded.items():
            self._unhook(one)
            one.strength = float(strengths.get(name, 0.0))
            self._attach(one)

    def _check_loaded(self, name: str) -> None:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none is loaded"
            raise UserError(f"no LoRA named {name!r} is loaded ({known}).")

    def fuse(self) -> None:
        """Add all attached files to the weights."""
        for one in self._loaded.values():
            if not one.hooks:
                continue
            self._unhook(one)
            for place, change in one.changes.items():
                weight = self._layer(place).weight
                own = self._keep(place, "weight").to(weight.device)
                add_to(weight, one.strength * change.delta(own))
            for place, changes in one.whole.items():
                for name, change_of in changes.items():
                    self._keep(place, name)
                    add_to(getattr(self._layer(place), name), one.strength * change_of.float())

    def _keep(self, place: Place, name: str) -> Tensor:
        """A weight or bias as the model had it, kept for going back."""
        parameter = getattr(self._layer(place), name).detach()
        if (place, name) not in self._before:
            self._before[place, name] = parameter.clone()
        return self._before[place, name]

    def unload(self, name: str | None = None) -> None:
        """Take a file off, or all; the weights are then what they were.

        Raises: UserError: no such file; or it is fused together with others.
        """
        if name is not None:
            self._check_loaded(name)
        names = list(self._loaded) if name is None else [name]
        fused = [n for n, one in self._loaded.items() if not one.hooks]
        if name in fused and len(fused) > 1:
            raise UserError(
                f"{name} is fused together with {', '.join(n for n in fused if n != name)}; unload "
                "all with unload_lora(), and load again what should stay."
            )
        for each in names:
            self._unhook(self._loaded[each])
        if any(each in fused for each in names):
            for (place, parameter), before in self._before.items():
                getattr(self._layer(place), parameter).data.copy_(before)
            self._before.clear()
        for each in names:
            del self._loaded[each]

    @contextmanager
    def also(self, files: Iterable[tuple[str | Path, float]]) -> Iterator[list[dict[str, Any]]]:
        """Attach further files, with a weight each, within the block.

        Yields:  what is recorded of them.
        Raises:  UserError: as `load` does.
        """
        names = list[str]()
        try:
            for path, weight in files:
                names.append(self.load(path, weight))
            yield [one for one in self.records() if one["name"] in names]
        finally:
            for name in names:
                self.unload(name)

    def _layer(self, place: Place) -> Any:
        part, module = place
        return self._parts[part].get_submodule(module)

    @staticmethod
    def _unhook(one: _Loaded) -> None:
        for hook in one.hooks:
            hook.remove()
        one.hooks.clear()


def lora_and_weight(text: str) -> tuple[str, float]:
    """("style.safetensors", 0.7) from "style.safetensors:0.7"; the weight may be left out.

    Raises: UserError: the weight is no number.
    """
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in weight or "\\" in weight:  # C:\style
        return text, 1.0
    try:
        return file, float(weight)
    except ValueError:
        raise UserError(f"--lora must be FILE or FILE:WEIGHT; got {text!r}.") from None


def parts_of(components: Components) -> dict[str, nn.Module]:
    """The networks of a model by the names that files use."""
    return {"unet": components.unet, "text_encoder": components.text_encoder.module}


def match(
    file: LoraFile, parts: Mapping[str, nn.Module]
) -> tuple[dict[Place, Change], dict[Place, dict[str, Tensor]]]:
    """Find the layer of every change in a file.

    Returns: changes of low rank, and whole ones in the shapes of the weights and biases.
    Raises:  UserError: naming what matches nothing, or what has other shapes than the model.
    """
    layers: dict[str, dict[str, Any]]
    unet: Any = parts["unet"]
    layers = {part: {**layers_of(module), **norms_of(module)} for part, module in parts.items()}
    known = places(layers, unet_names(unet.config))
    named = [*file.weights, *file.whole]
    lost = [name for name in dict.fromkeys(named) if name not in known]
    if lost:
        count = "nothing" if len(lost) == len(set(named)) else "not everything"
        raise UserError(
            f"{file.path} changes layers that this model does not have, so {count} of it fits; it "
            f"was made for another model. Not found here: {some(lost)}.{_guess(file.weights)}"
        )
    found = {known[name]: change for name, change in file.weights.items()}
    whole = {known[name]: changes for name, changes in file.whole.items()}
    if unfit := [*_unfit(found, layers), *_unfit_whole(whole, layers)]:
        raise UserError(
            f"{file.path} was made for another base model, whose layers have other sizes: "
            f"{some(unfit, 3)}.{_guess(file.weights)}"
        )
    for (part, module), changes in whole.items():
        for of, change in changes.items():  # a matrix may be for a 1×1 convolution
            changes[of] = change.reshape(getattr(layers[part][module], of).shape)
    return found, whole


def _unfit(changes: Mapping[Place, Change], layers: Mapping[str, Any]) -> Iterator[str]:
    for (part, module), change in changes.items():
        weight = layers[part][module].weight
        if not fits(change, weight):
            yield (
                f"{part}.{module} is {tuple(weight.shape)} here and the file changes "
                f"({', '.join(map(str, change.shape))})"
            )


def _unfit_whole(
    whole: Mapping[Place, Mapping[str, Tensor]], layers: Mapping[str, Any]
) -> Iterator[str]:
    for (part, module), changes in whole.items():
        for of, change in changes.items():
            own = getattr(layers[part][module], of)
            if own is None:
                yield f"{part}.{module} has no {of} here"
            elif own.shape[:1] != change.shape[:1] or own.numel() != change.numel():
                yield (
                    f"{part}.{module}.{of} is {tuple(own.shape)} here and the file changes "
                    f"{tuple(change.shape)}"
                )


def _guess(changes: Mapping[str, Change]) -> str:
    """Which family has such a text width, where one layer shows it."""
    for name, change in changes.items():
        if name.endswith(("attn2.to_k", "attn2_to_k")) and change.shape[1] in BASES:
            width = change.shape[1]
            return f" Its text states are {width} wide, as those of {BASES[width]} are."
    return ""
