"""How an image was made, as text in its file: written, and read, from other programs' files too.

A file that we write holds two texts. `parameters` is what AUTOMATIC1111's stable-diffusion-webui
writes, for the programs that show it: prompt, negative prompt, and one last line of settings

    a cat,
    on a mat
    Negative prompt: dog
    Steps: 4, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, Model: "m [v1, x]"

in which values with commas, colons or line breaks are JSON strings. `latentdiff` is the settings
themselves as JSON, of which nothing is lost. `images.save_image` says where in a file they are.
Imports nothing heavy.

Source: stable-diffusion-webui, modules/infotext_utils.py, modules/processing.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError, some, whole_text
from latentdiff.files import parse_json
from latentdiff.images import read_texts, save_image

if TYPE_CHECKING:
    from PIL.Image import Image

#: Sampler and timestep spacing → what A1111 calls them. Its Uniform interpolates between both ends
#: as linspace does; its Simple and DDIM are trailing and leading up to rounding.
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "unipc": "UniPC",
    "lms": "LMS",
    "pndm": "PLMS",
    "lcm": "LCM",
}
SCHEDULES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "align_your_steps": "Align Your Steps",
    "linspace": "Uniform",
    "trailing": "Simple",
    "leading": "DDIM",
}
#: Its other names of these, in small letters.
_SAME = {"normal": "linspace", "sgm uniform": "trailing"}
#: What files mean that name no schedule; linspace for other samplers.
_USUAL_SPACING = {"ddim": "leading", "pndm": "leading", "unipc": "leading", "lcm": "lcm"}
#: What "Automatic" means where it is something else.
_AUTOMATIC = {
    "dpmpp_2m": "karras",
    "dpmpp_2s_ancestral": "karras",
    "dpmpp_2m_sde": "exponential",
}
#: Beginnings of fields → why such an image cannot be made from its settings.
_BEYOND = {
    "Hires prompt": "its second pass (hires fix) had a prompt of its own",
    "Hires negative": "its second pass (hires fix) had a prompt of its own",
    "Hires checkpoint": "its second pass (hires fix) had a model of its own",
    "Hires resize": "its second pass (hires fix) has another shape",
    "Variation seed": "its noise is a mixture of two seeds",
    "Seed resize": "its noise is that of another size",
    "Refiner": "two models made it (a refiner)",
    "Hypernet": "a hypernetwork took part",
    "ControlNet": "a ControlNet took part",
}
_LORA = re.compile(r"<lora:([^:<>]+):([^:<>]+)[^<>]*>")
_PAIR = re.compile(r'\s*(\w[\w \-/]{1,99}):\s*("(?:\\.|[^\\"])++"|[^,]*)(?:,|$)')
#: Of these a line of settings has one; a prompt such as "style: ink, mood: calm, light: low" none.
_USUAL = frozenset({"Steps", "Sampler", "CFG scale", "Seed", "Size", "Model"})
#: Characters of a line of settings; the pattern takes quadratic time.
_LONGEST = 2**16
_NEGATIVE = "Negative prompt:"
OURS, A1111 = "latentdiff", "AUTOMATIC1111"
_PROMPTS = ("prompt", "negative_prompt")
#: Under which names ComfyUI has its graph: as it is run, and as it is drawn.
_GRAPHS = ("prompt", "workflow")


def write_parameters(prompt: str, negative: str, fields: Mapping[str, Any]) -> str:
    """A1111's text. Fields that are None are left out."""
    texts = [prompt, *([f"{_NEGATIVE} {negative}"] if negative else [])]
    pairs = [f"{name}: {_quoted(str(v))}" for name, v in fields.items() if v is not None]
    return "\n".join([*texts, ", ".join(pairs)]).strip()


def _quoted(value: str) -> str:
    plain = value == value.strip() and not re.search(r'^$|^"|[,:\r\n]', value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def read_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and fields of A1111's text; any of them may be missing.

    A last line that only looks like settings, such as one of several <lora:name:1>, is the
    prompt's.
    """
    *lines, last = text.replace("\r\n", "\n").strip("\n ").split("\n")
    fields = {name: _unquoted(value) for name, value in _pairs(last)}
    if len(fields) < 3 or not _USUAL & fields.keys():
        lines, fields = [*lines, last], {}
    prompt: list[str] = []
    negative: list[str] = []
    into = prompt
    for line in lines:
        if line.lstrip().startswith(_NEGATIVE):
            into, line = negative, line.lstrip().removeprefix(_NEGATIVE).removeprefix(" ")
        into.append(line)
    return "\n".join(prompt), "\n".join(negative), fields


def _pairs(line: str) -> list[tuple[str, str]]:
    begins_with_one = len(line) <= _LONGEST and _PAIR.match(line)
    return _PAIR.findall(line) if begins_with_one else []


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value[:1] == '"' else value
    except ValueError:  # a quote of its own
        return value


@dataclass(frozen=True)
class Record:
    """What the file of an image says about how it was made."""

    program: str = ""
    """What wrote it; "" where nothing is said."""
    settings: dict[str, Any] = field(default_factory=dict)
    """As `PipelineOutput.settings` has them; of other programs' those that mean the same here."""
    why_not: str = ""
    """Why the image cannot be made again from them; "" where it can."""
    edited: list[str] = field(default_factory=list)
    """Fields that say otherwise in `parameters` than in the settings."""


_IMAGE_RECORD = {"file": str | None, "hash": str}
#: What settings are, as making an image again relies on it: a type, the values, for objects the
#: kinds of some names (… of all others), for lists that of every member.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("task", "prompt", "negative_prompt", "prompt_syntax", "sampler"), str),
    **dict.fromkeys(("seed", "num_inference_steps", "height", "width"), int),
    **dict.fromkeys(("guidance_scale", "guidance_rescale"), int | float),
    "timestep_spacing": str | None,
    "device": ("cpu", "cuda", "mps"),
    "dtype": ("float32", "bfloat16", "float16"),
    **dict.fromkeys(("timesteps", "guidance_interval"), list | None),
    "sampler_options": {...: int | float | None},
    "versions": {...: str},
    "arguments": {
        **dict.fromkeys(("image", "mask_image"), _IMAGE_RECORD),
        **dict.fromkeys(("height", "width"), int),
        **dict.fromkeys(("frames", "frame"), range(10_000)),
    },
    "model": dict.fromkeys(("source", "name", "hash", "variant", "revision", "vae"), str | None),
    "loras": [{"file": str, "weight": int | float}],
    "embeddings": [{"file": str, "token": str}],
    "batch": {"size": range(1, 1025), "place": range(1024), "guided": bool},
    **dict.fromkeys(("batch_size", "clip_skip"), int),
    "threads": range(1, 1025),
}
_KINDS["images"] = [_KINDS]
_NEEDED = ("task", "prompt", "seed", "num_inference_steps", "sampler", "height", "width")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, dict):
        given = value.items() if isinstance(value, dict) else ()
        fit = (_fits(one, kind.get(name, kind.get(...))) for name, one in given)
        return isinstance(value, dict) and all(fit)
    if kind is None:
        return True
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(one, kind[0]) for one in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(kind, tuple | range):
        return value in kind and not isinstance(value, float)
    return isinstance(value, kind)


def texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """The two texts of a file, for `images.save_image`."""
    return {"parameters": parameters(settings), OURS: json.dumps(settings, default=str)}


def parameters(settings: Mapping[str, Any]) -> str:
    """The settings of an image as A1111 would write them, as far as it has them."""
    given, model = settings.get("arguments", {}), settings.get("model", {})
    scale, clip_skip = settings.get("guidance_scale"), settings.get("clip_skip")
    sampler = settings["sampler"]
    hashes = [f"{one.get('name')}: {one.get('hash')}" for one in settings.get("loras", ())]
    fields = {
        "Steps": settings["num_inference_steps"],
        "Sampler": SAMPLERS.get(sampler, sampler),
        "Schedule type": SCHEDULES.get(settings.get("timestep_spacing") or ""),
        "CFG scale": int(scale) if isinstance(scale, float) and scale.is_integer() else scale,
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": model.get("hash"),
        "Model": model.get("name"),
        "Denoising strength": given.get("strength", given.get("hires_strength")),
        "Hires upscale": given.get("hires_scale"),
        "Clip skip": clip_skip + 1 if clip_skip else None,
        "Mask blur": given.get("mask_blur"),
        "Lora hashes": ", ".join(hashes) or None,
        "RNG": "CPU",
        "Version": f"latentdiff {settings.get('versions', {}).get('latentdiff')}",
    }
    return write_parameters(settings["prompt"], settings.get("negative_prompt", ""), fields)


def of_grid(settings: Sequence[Mapping[str, Any]], columns: int | None) -> dict[str, Any]:
    """The settings of a grid: those of its first image, and where each image's differ."""
    first = dict(settings[0])
    if len(settings) == 1:
        return first
    others = [{k: v for k, v in one.items() if v != first.get(k)} for one in settings]
    return {**first, "images": others, "columns": columns}


def write(image: Image, file: Path, settings: Mapping[str, Any]) -> Path:
    """Save an image with its settings; returns and raises what `images.save_image` does."""
    return save_image(image, file, texts({**settings, "pixels": pixels_hash(image)}))


def pixels_hash(image: Image) -> str:
    """Of the size and the 8-bit values: equal for equal images."""
    head = f"{image.mode} {image.size}".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()[:16]


def read(file: Path | bytes) -> Record:
    """What a file says about how its image was made.

    Raises: UserError: there is no image.
    """
    found = read_texts(file)
    if OURS in found:
        return _ours(found)
    if "parameters" in found:
        return _a1111(found["parameters"])
    for name in ("invokeai_metadata", "sd-metadata"):
        if name in found:
            shown = _json(found[name])
            return Record("InvokeAI", shown, "its seeds and models are InvokeAI's own")
    for name in _GRAPHS:
        in_exif = (t.removeprefix(f"{name}:") for t in found.values() if t.startswith(f"{name}:"))
        for text in (found.get(name, ""), *in_exif):
            if nodes := _json(text):
                return _comfyui(nodes)
    other = f"; it has texts called {some(found)}" if found else ", or no more"
    return Record(why_not=f"it does not say how it was made{other}")


def _json(text: str) -> dict[str, Any]:
    try:
        return parse_json(text, OURS)
    except UserError:
        return {}


def _ours(found: Mapping[str, str]) -> Record:
    settings = _json(found[OURS])
    wrong = [
        f"{name} is {value!r:.40}"
        for name, value in settings.items()
        if name in _KINDS and not _fits(value, _KINDS[name])
    ]
    wrong += [f"{name} is missing" for name in _NEEDED if name not in settings]
    if wrong:
        return Record(OURS, {}, f"its settings are damaged ({some(wrong)})")
    edited = []
    if text := found.get("parameters"):
        *own, fields = read_parameters(whole_text(parameters(settings)))
        *other, changed = read_parameters(text)
        edited = [n for n, a, b in zip(_PROMPTS, own, other, strict=True) if a != b]
        edited += [n for n in fields if changed.get(n, fields[n]) != fields[n]]
    return Record(OURS, settings, edited=edited)


def _comfyui(nodes: Mapping[str, Any]) -> Record:
    """What the nodes of a graph are given as plain values, of the usual ones."""
    shown: dict[str, Any] = {}
    for node in nodes.values():
        given = node.get("inputs") if isinstance(node, dict) else None
        for name, value in given.items() if isinstance(given, dict) else ():
            if isinstance(value, str | int | float):
                shown[f"{node.get('class_type')}: {name}"] = value
    return Record("ComfyUI", shown, "it is a graph of ComfyUI's nodes, which only ComfyUI can run")


def _a1111(text: str) -> Record:
    prompt, negative, fields = read_parameters(text)
    try:
        return Record(A1111, _understood(prompt, negative, fields))
    except UserError as error:
        shown = {"prompt": prompt, "negative_prompt": negative, **fields}
        return Record(A1111, shown, str(error))


def _understood(prompt: str, negative: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The settings that A1111's fields mean here. Raises: UserError: they have no equal here."""
    if not fields:
        raise UserError("it has a prompt and no settings")
    for start, why in _BEYOND.items():
        if any(name.startswith(start) for name in fields):
            raise UserError(why)
    strength, scale = fields.get("Denoising strength"), fields.get("Hires upscale")
    if strength and not scale:
        raise UserError("it was made from another image, which the file does not hold")
    sampler, spacing = _sampler(fields.get("Sampler", ""), fields.get("Schedule type"))
    size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", fields.get("Size", ""))
    try:
        return {
            "task": "text_to_image",
            "prompt": _LORA.sub("", prompt),
            "negative_prompt": negative,
            "prompt_syntax": "a1111",
            "sampler": sampler,
            "timestep_spacing": spacing,
            "num_inference_steps": int(fields["Steps"]),
            "seed": int(fields["Seed"]),
            "guidance_scale": float(fields["CFG scale"]),
            **({"width": int(size[1]), "height": int(size[2])} if size else {}),
            **({"clip_skip": int(skip) - 1} if (skip := fields.get("Clip skip")) else {}),
            "arguments": (
                {"hires_scale": float(scale), "hires_strength": float(strength or 0.7)}
                if scale
                else {}
            ),
            "model": {"name": fields.get("Model"), "hash": fields.get("Model hash")},
            "loras": [{"name": name, "weight": float(w)} for name, w in _LORA.findall(prompt)],
        }
    except KeyError as error:
        raise UserError(f"its settings lack {error}") from None
    except ValueError as error:
        raise UserError(f"its settings are damaged ({error})") from None


def _sampler(name: str, schedule: str | None) -> tuple[str, str]:
    """(sampler, spacing) of A1111's names; older files have both in one: "DPM++ 2M Karras"."""
    names = {label.lower(): key for key, label in SAMPLERS.items()}
    wanted, old = name.lower(), None
    for ending in ("karras", "exponential"):
        if wanted.endswith(f" {ending}"):
            wanted, old = wanted.removesuffix(f" {ending}"), ending
    if wanted not in names:
        known = ", ".join(SAMPLERS.values())
        raise UserError(f"its sampler {name!r:.60} is not supported here ({known})")
    return names[wanted], spacing_of(names[wanted], old if schedule is None else schedule)


def spacing_of(sampler: str, schedule: str | None) -> str:
    """The timestep spacing that A1111's schedule type means.

    Args:    schedule: a label or name, in any case; None: a file's that names none.
    Raises:  UserError: it has no equal here.
    """
    usual = _USUAL_SPACING.get(sampler, "linspace")
    if schedule is None:
        return usual
    spacings = {label.lower(): key for key, label in SCHEDULES.items()} | _SAME
    spacings["automatic"] = _AUTOMATIC.get(sampler, usual)
    wanted = schedule.lower().replace("_", " ")
    if wanted not in spacings:
        raise UserError(
            f"the schedule type {schedule!r:.60} is not supported here ({', '.join(spacings)})"
        )
    return spacings[wanted]
