"""The config engine: YAML file + `a.b=value` overrides → one checked tree of frozen dataclasses.

A configuration is a stdlib dataclass that lives beside the code it configures; each field has a
string literal below it as its documentation. Every mistake in a file is reported in one go, with
its dotted path. Variants of a section are dataclasses told apart by a `kind: Literal[...]` field.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from latentdiff.config_types import (
    MISSING,
    fields_of,
    kinds_of,
    options,
    sections,
    type_name,
    words_of,
)
from latentdiff.config_yaml import parse_yaml, read_yaml, to_inline
from latentdiff.errors import UserError, did_you_mean

T = TypeVar("T")
Problems = list[tuple[str, str]]


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build a configuration from defaults, then a YAML file, then `a.b=value` overrides.

    Args:
        cls: a dataclass, usually of dataclasses.
        path: YAML file (may say `extends: other.yaml`); None for the defaults alone.
        overrides: dotted keys with YAML values: `optimizer.lr=1e-4`, `data.captions=[a, b]`.
    Raises: UserError: listing every unknown key, wrong type, unknown word and failed check.
    """
    data: dict[str, Any] = read_yaml(path) if path is not None else {}
    for text in overrides:
        _apply_override(cls, data, text)
    problems: Problems = []
    data = _resolve(cls, data, "", problems)
    problems += _unusable(data, "")
    config = _build(cls, data, problems)
    if config is not None and not problems:
        problems += list(_cross_checks(config, ""))
    if problems or config is None:
        raise UserError(_report(problems, path))
    return config


def to_dict(config: object) -> Any:
    """Turn a configuration into plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(config):
        fields = (f for f in dataclasses.fields(config) if f.init)
        return {f.name: to_dict(getattr(config, f.name)) for f in fields}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config


def describe(cls: type, prefix: str = "", instance: object = None) -> str:
    """List every dotted key with its type, default and documentation, for `--help`."""
    lines: list[str] = []
    for field in fields_of(cls).values():
        key, variants = prefix + field.name, sections(field.type)
        value, doc = getattr(instance, field.name, field.default), " ".join(field.doc.split())
        if not variants:
            default = "required" if value is MISSING else to_inline(to_dict(value))
            lines += [f"{key}  ({type_name(field.type)}; {default})"] + ([f"    {doc}"] * bool(doc))
            continue
        lines += [f"{key}.…  {doc}"] if doc else []
        for variant in variants:
            if len(variants) > 1:
                lines.append(f"when {key}.kind={'|'.join(map(str, kinds_of(variant)))}:")
            own = value if isinstance(value, variant) else None
            lines.append(describe(variant, key + ".", own))
    return "\n".join(lines)


# --- overrides ---------------------------------------------------------------------------------


def _apply_override(cls: type, data: dict[str, Any], text: str) -> None:
    key, equals, raw = text.lstrip("-").partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"an override must look like section.key=value; got {text!r}.")
    for index, part in enumerate(parts[:-1]):
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise UserError(f"{text}: {'.'.join(parts[: index + 1])} is {data!r}, not a section.")
    data[parts[-1]] = _parse_value(raw, _leaf_type(cls, parts))


def _parse_value(raw: str, leaf: Any) -> Any:
    try:
        value = parse_yaml(raw)
    except yaml.YAMLError:
        return raw
    takes_text = str in options(leaf)
    only_text = all(option in (str, type(None)) for option in options(leaf))
    # `data.path=2024` and `prompt=a: b` are meant as text where only text fits.
    if takes_text and only_text and not isinstance(value, str | None):
        return raw
    return value


def _leaf_type(cls: type, parts: list[str]) -> Any:
    candidates: list[Any] = [cls]
    for part in parts:
        found = [fields_of(c)[part].type for c in candidates if part in fields_of(c)]
        if not found:
            return object
        leaf, candidates = found[0], [s for tp in found for s in sections(tp)]
    return leaf


# --- defaults, unknown keys, variants ----------------------------------------------------------


def _resolve(cls: type, data: Any, path: str, problems: Problems) -> Any:
    """Return `data` over the defaults of `cls`, without the keys that `cls` does not know."""
    if data is None:
        data = {}  # `section:` with nothing below it
    if not isinstance(data, dict):
        return data  # pydantic words the error
    fields, result = fields_of(cls), {}
    for key, value in data.items():
        if key not in fields and not _had_no_effect(cls, key, value):
            problems.append((_join(path, key), _unknown_key(cls, str(key), value)))
    for name, field in fields.items():
        where = _join(path, name)
        if sections(field.type):
            given = name in data or field.default is not None
            if given:
                result[name] = _resolve_section(field, data, where, problems)
        elif get_origin(field.type) in (list, tuple) and isinstance(data.get(name), list):
            inner = sections(get_args(field.type)[0])
            result[name] = [
                _resolve(inner[0], item, f"{where}.{i}", problems) if inner else item
                for i, item in enumerate(data[name])
            ]
        elif name in data:
            result[name] = data[name]
    return result


def _had_no_effect(cls: type, key: Any, value: Any) -> bool:
    """Whether a key was removed and is given, as saved configurations do, at the value for "off".

    A dataclass lists removed keys in a class attribute `removed`: key → its value for "off"; of a
    section, the keys that switched it on.
    """
    removed: dict[str, Any] = getattr(cls, "removed", {})
    if key not in removed:
        return False
    off = removed[key]
    if isinstance(off, dict) and isinstance(value, dict):
        return all(value.get(k, v) == v for k, v in off.items())
    return value is None or bool(value == off)


def _resolve_section(field: Any, data: dict[str, Any], where: str, problems: Problems) -> Any:
    """Overlay a section on the field's own default instance, choosing the variant by `kind`."""
    variants = sections(field.type)
    default = to_dict(field.default) if dataclasses.is_dataclass(field.default) else {}
    given = data.get(field.name, {})
    if given is None and type(None) in options(field.type):
        return None
    if given is not None and not isinstance(given, dict):
        return given
    given = given or {}
    kind = given.get("kind", default.get("kind"))
    chosen = next((v for v in variants if kind in kinds_of(v)), variants[0])
    if len(variants) > 1 and kind not in kinds_of(chosen):
        kinds = [k for v in variants for k in kinds_of(v)]
        problems.append((_join(where, "kind"), _wrong_word(kind, kinds)))
        return default
    if len(variants) > 1 and not isinstance(field.default, chosen):
        default = {}
    return _resolve(chosen, {**default, **_under(default, given)}, where, problems)


def _under(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Keep what the default instance says inside sub-sections that `given` only partly sets."""
    merged = {}
    for key, value in given.items():
        old = default.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            same = value.get("kind", old.get("kind")) == old.get("kind")
            merged[key] = {**old, **_under(old, value)} if same else value
        else:
            merged[key] = default[key] if value is None and isinstance(old, dict) else value
    return merged


# --- validation --------------------------------------------------------------------------------


def _unusable(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Values that YAML can write and that are of no use to any key."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unusable(item, _join(path, key))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"must be a finite number; got {value}."
    elif isinstance(value, str) and value != _whole(value):
        yield path, f"holds half of a character (a lone surrogate); got {value!r:.200}."


def _whole(text: str) -> str:
    """Text as UTF-8 can write it, with ? for halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _build(cls: type[T], data: Any, problems: Problems) -> T | None:
    from pydantic import TypeAdapter, ValidationError

    # Strict JSON mode: lists become tuples and whole numbers floats, but "1" is not 1 nor 1 true.
    try:
        text = _whole(json.dumps(data, ensure_ascii=False))
        return TypeAdapter(cls).validate_json(text, strict=True)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            path, leaf = _locate(cls, data, item["loc"])
            if path is not None:
                found.setdefault(path, []).append(_wording(dict(item), leaf))
        problems += [(path, " ".join(dict.fromkeys(texts))) for path, texts in found.items()]
        return None


def _locate(cls: type, data: Any, loc: tuple[Any, ...]) -> tuple[str | None, Any]:
    """Turn pydantic's location into a dotted path and the type there; None: another variant's."""
    path, tp, value = "", cls, data
    steps = list(loc)
    while steps:
        step = steps.pop(0)
        variants = sections(tp)
        kind = value.get("kind") if isinstance(value, dict) else None
        chosen = next((v for v in variants if kind in kinds_of(v)), variants[0] if variants else tp)
        if len(variants) > 1 and isinstance(value, dict):
            if step not in (chosen.__name__, kind):
                return None, None
            if not steps:
                break
            step = steps.pop(0)
        if sections(tp) and step in fields_of(chosen):
            path, tp = _join(path, step), fields_of(chosen)[step].type
            value = value.get(step) if isinstance(value, dict) else None
        elif isinstance(step, int) and isinstance(value, list):
            args = [a for a in get_args(next(options(tp))) if a is not Ellipsis] or [object]
            path, value = _join(path, step), value[step] if step < len(value) else None
            tp = args[min(step, len(args) - 1)]
        # Anything else is pydantic's name of a union member, not a key.
    return path, tp


def _wording(error: dict[str, Any], leaf: Any) -> str:
    given, words = error.get("input"), words_of(leaf)
    if error["type"] == "missing":
        return f"is required ({type_name(leaf)})."
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "literal_error" or (words and not isinstance(given, list)):
        return _wrong_word(given, words + [None] * (type(None) in options(leaf)))
    if error["type"].endswith(("_type", "_parsing")):
        quote = " Write it in quotes." if error["type"] == "string_type" else ""
        hint = quote if isinstance(given, int | float) else ""
        return f"must be {_with_article(leaf)}; got {given!r:.200}.{hint}"
    return f"{error['msg']}; got {given!r:.200}."


def _with_article(tp: Any) -> str:
    if sections(tp):
        return "a section of `key: value` lines"
    return " or ".join(
        f"a {name}" if name.endswith("number") or name.startswith("list") else name
        for name in type_name(tp).replace("true|false", "true or false").split(" or ")
    )


def _wrong_word(given: Any, allowed: list[Any]) -> str:
    words = ["null" if word is None else str(word) for word in allowed]
    return f"must be one of {', '.join(words)}; got {given!r}.{did_you_mean(str(given), words)}"


def _unknown_key(cls: type, key: str, value: Any) -> str:
    if key in getattr(cls, "removed", {}):
        return (
            f"this option was removed (given {value!r:.80}). A run that used it can only be "
            "resumed with the version that started it; its environment.json names the commit."
        )
    allowed = list(fields_of(cls))
    hint = did_you_mean(key, allowed)
    return f"unknown key (given {value!r:.80}). Allowed here: {', '.join(allowed)}.{hint}"


def _cross_checks(config: Any, path: str) -> Iterator[tuple[str, str]]:
    """Collect what each dataclass's own `validate(self) -> list[str]` complains about."""
    if dataclasses.is_dataclass(config):
        check = getattr(config, "validate", None)
        yield from ((path, text) for text in (check() if callable(check) else ()))
        for field in dataclasses.fields(config):
            yield from _cross_checks(getattr(config, field.name), _join(path, field.name))
    elif isinstance(config, list | tuple):
        for index, item in enumerate(config):
            yield from _cross_checks(item, _join(path, index))


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _report(problems: Problems, path: str | Path | None) -> str:
    lines = [f"  {where or '(whole config)'}: {text}" for where, text in problems]
    head = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    source = f" ({path} and overrides)" if path is not None else ""
    return "\n".join([f"{head} in the configuration{source}:", *lines])
