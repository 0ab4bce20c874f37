"""The config engine: YAML file + `a.b=value` overrides → one checked tree of frozen dataclasses.

A configuration is a stdlib dataclass that lives beside the code it configures; each field has a
string literal below it as its documentation. Every mistake in a file is reported in one go, with
its dotted path. Variants of a section are dataclasses, each with a tag `kind: Literal[...]`.

Of a dataclass the engine also knows
    validate(self) -> list[str]   complaints about fields that do not go together
    removed: ClassVar             keys it had → their values for "off", at which they may stand in
                                  saved files; of a section, the keys that switched it on
    renamed: ClassVar             names its fields had → those of today, which both are read; for a
                                  section that it had, its keys → their places, which are errors
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Interval

from latentdiff.errors import UserError, did_you_mean, wrong_word
from latentdiff.plain_yaml import parse_yaml, read_yaml, to_inline

T = TypeVar("T")
#: (dotted path, what is wrong there)
Problems = list[tuple[str, str]]
MISSING = dataclasses.MISSING
#: Ranges of numbers, as types of fields: `steps: AtLeastOne[int]`.
Positive = Annotated[T, Gt(0)]
NotNegative = Annotated[T, Ge(0)]
AtLeastOne = Annotated[T, Ge(1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
_RANGES = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
}
#: Metadata of an option that changes no number of a training: a resumed run may differ in it.
FREE: dict[str, bool] = {"changes_numbers": False}


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build a configuration from defaults, then a YAML file, then `a.b=value` overrides.

    Args:
        cls: a dataclass, usually of dataclasses.
        path: YAML file (may say `extends: other.yaml`); None for the defaults alone.
        overrides: dotted keys with YAML values: `optimizer.lr=1e-4`, `data.captions=[a, b]`.
    Raises: UserError: listing every unknown key, wrong type, unknown word and failed check.
    """
    return build(cls, given_values(cls, path, overrides), path)


def given_values(cls: type, path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What a file and overrides say, unchecked. Raises: UserError: not readable as such."""
    data = read_yaml(path) if path is not None else {}
    for text in overrides:
        _apply_override(cls, data, text)
    return data


def build(cls: type[T], data: dict[str, Any], path: str | Path | None = None) -> T:
    """The configuration that `given_values` asks for. Raises: UserError: see `load_config`."""
    problems: Problems = []
    config = _section([cls], MISSING, data, "", problems)
    if not problems:
        return config
    head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    source = f" ({path} and overrides)" if path is not None else ""
    lines = [f"  {where or '(whole config)'}: {text}" for where, text in problems]
    raise UserError("\n".join([f"{head} in the configuration{source}:", *lines]))


def removed_options(config: Any) -> dict[str, Any]:
    """Dotted keys of the options that were removed, and their values for "off"."""
    found = dict[str, Any]()
    for key, off in getattr(config, "removed", {}).items():
        found |= {f"{key}.{k}": v for k, v in off.items()} if isinstance(off, dict) else {key: off}
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{option.name}.{key}": off for key, off in removed_options(value).items()}
    return found


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


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def deciding_values(config: Any) -> dict[str, Any]:
    """Dotted keys of a configuration and their plain values, those marked `FREE` left out."""
    found: dict[str, Any] = {}
    for option in dataclasses.fields(config):
        if option.metadata.get("changes_numbers", True):
            value = getattr(config, option.name)
            inner = dataclasses.is_dataclass(value)
            found[option.name] = deciding_values(value) if inner else to_dict(value)
    return flat(found)


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


# --- what a dataclass says ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """One field: its resolved type, default (MISSING when required) and docstring."""

    name: str
    type: Any
    default: Any
    doc: str


@cache
def fields_of(cls: type) -> dict[str, FieldInfo]:
    """List the init fields of a dataclass in order, with types resolved and docs found."""
    hints = get_type_hints(cls, include_extras=True)
    docs = _field_docs(cls)
    return {
        f.name: FieldInfo(
            f.name,
            hints[f.name],
            f.default if f.default_factory is MISSING else f.default_factory(),
            docs.get(f.name, ""),
        )
        for f in dataclasses.fields(cls)
        if f.init
    }


def _field_docs(cls: type) -> dict[str, str]:
    """Read the string literals below the fields from the source, base classes first."""
    docs: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, SyntaxError, TypeError):
            continue  # defined where no source exists (exec, REPL): no docs, nothing else is lost
        for node, after in itertools.pairwise(getattr(tree.body[0], "body", ())):
            match node, after:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    docs[name] = inspect.cleandoc(text)
    return docs


def options(tp: Any) -> Iterator[Any]:
    """Yield the members of a union, seeing through Annotated and nested unions."""
    origin = get_origin(tp)
    if origin is Annotated:
        yield from options(get_args(tp)[0])
    elif origin in (Union, types.UnionType):
        for arg in get_args(tp):
            yield from options(arg)
    else:
        yield tp


def sections(tp: Any) -> list[type]:
    """List the dataclasses that a field's type allows (several: variants, tagged by `kind`)."""
    return [t for t in options(tp) if isinstance(t, type) and dataclasses.is_dataclass(t)]


def words_of(tp: Any) -> list[Any]:
    """List the words of a type's Literals."""
    return [w for t in options(tp) if get_origin(t) is Literal for w in get_args(t)]


def kinds_of(cls: type) -> list[Any]:
    """List the values of a variant's `kind` tag."""
    kind = fields_of(cls).get("kind")
    return words_of(kind.type) if kind else []


def type_name(tp: Any) -> str:
    """Name a type in words for help and errors."""
    plain = {int: "whole number", float: "number", bool: "true|false", str: "text"}
    names = []
    for option in options(tp):
        if get_origin(option) is Literal:
            names.append("|".join(map(str, get_args(option))))
        elif option is types.NoneType:
            names.append("null")
        elif get_origin(option) in (list, tuple):
            inner = [a for a in get_args(option) if a is not Ellipsis]
            names.append(f"list of {' and '.join(dict.fromkeys(map(type_name, inner)))}")
        else:
            names.append(plain.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(dict.fromkeys(names))


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
    data[parts[-1]] = _parse_value(raw, _type_at(cls, parts))


def _parse_value(raw: str, tp: Any) -> Any:
    try:
        value = parse_yaml(raw)
    except yaml.YAMLError:
        return raw
    # `data.path=2024` and `prompt=a: b` are meant as text where only text fits.
    only_text = str in options(tp) and {*options(tp)} <= {str, types.NoneType}
    return raw if only_text and not isinstance(value, str | None) else value


def _type_at(cls: type, parts: Sequence[str]) -> Any:
    """The type of the field at a dotted key; of variants' fields the first one's."""
    found: list[Any] = [cls]
    for part in parts:
        known = [fields_of(section) for tp in found for section in sections(tp)]
        found = [fields[part].type for fields in known if part in fields]
    return found[0] if found else object


# --- building and checking ---------------------------------------------------------------------


def _section(variants: list[type], default: Any, given: Any, path: str, problems: Problems) -> Any:
    """What is given of a section over its default instance; None, with problems: it is not valid.

    Where the given `kind` is not the default's, the variant's own defaults take its place.
    """
    given = {} if given is None else given  # `section:` with nothing below it
    if not isinstance(given, dict):
        problems.append((path, f"must be a section of `key: value` lines; got {given!r:.200}."))
        return None
    cls = _variant(variants, default, given, path, problems)
    if cls is None:
        return None
    given = _with_new_names(cls, given)
    problems += _misplaced(cls, given, path)
    before = len(problems)
    values, is_own = {}, isinstance(default, cls)
    for name, field in fields_of(cls).items():
        start = getattr(default, name) if is_own else field.default
        where, value, inner = _join(path, name), given.get(name, start), sections(field.type)
        if inner and (value is not None or not _takes_null(field.type)):
            values[name] = _section(inner, start, given.get(name), where, problems)
        elif name in given:
            values[name] = _value(field.type, value, where, problems)
        elif value is MISSING:
            problems.append((where, f"is required ({type_name(field.type)})."))
        elif is_own:
            values[name] = value
    if len(problems) > before:
        return None
    try:
        config = cls(**values)
    except ValueError as error:
        problems.append((path, str(error)))
        return None
    problems += [(path, text) for text in getattr(config, "validate", list)()]
    return config


def _variant(
    variants: list[type], default: Any, given: dict[str, Any], path: str, problems: Problems
) -> type | None:
    """The dataclass that `kind` names, where there are several."""
    if len(variants) == 1:
        return variants[0]
    kind = given.get("kind", getattr(default, "kind", None))
    known = {word: variant for variant in variants for word in kinds_of(variant)}
    if isinstance(kind, str) and kind in known:
        return known[kind]
    problems.append((_join(path, "kind"), wrong_word(kind, known)))
    return None


def _value(tp: Any, given: Any, path: str, problems: Problems) -> Any:
    """What is given for a field of a plain type, converted to it."""
    from pydantic import ValidationError

    try:
        # As JSON a list becomes a tuple and a whole number a float, but "1" is not 1 nor 1 true.
        return _adapter(tp).validate_json(json.dumps(given))
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            # The rest of pydantic's location are names of a union's members.
            indices = [step for step in item["loc"] if isinstance(step, int)]
            words = _wording(dict(item), given, _element(tp) if indices else tp)
            found.setdefault(".".join(map(str, [path, *indices])), []).append(words)
        problems += [(where, " ".join(dict.fromkeys(texts))) for where, texts in found.items()]


@cache
def _adapter(tp: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(tp, config=ConfigDict(strict=True, allow_inf_nan=False))


def _element(tp: Any) -> Any:
    """The type of the elements of a list or tuple."""
    return next((get_args(t)[0] for t in options(tp) if get_origin(t) in (list, tuple)), object)


def _wording(error: dict[str, Any], given: Any, tp: Any) -> str:
    if error["type"] == "json_invalid":
        return f"holds half of a character (a lone surrogate); got {given!r:.200}."
    value, words = error["input"], words_of(tp)
    if error["type"] == "finite_number":
        return f"must be a finite number; got {value}."
    if error["type"] == "missing":
        return f"is required ({type_name(tp)})."
    if error["type"] == "literal_error" or (words and not isinstance(value, list)):
        return wrong_word(value, [*map(str, words), *["null"] * _takes_null(tp)])
    if error["type"].endswith(("_type", "_parsing")):
        quote = error["type"] == "string_type" and isinstance(value, int | float)
        hint = " Write it in quotes." if quote else ""
        name = re.sub("(^| or )(whole number|number|list)", r"\1a \2", type_name(tp))
        return f"must be {name.replace('true|false', 'true or false')}; got {value!r:.200}.{hint}"
    if error["type"] in _RANGES:
        return f"must be {_RANGES[error['type']].format(**error['ctx'])}; got {value!r:.200}."
    return f"{error['msg']}; got {value!r:.200}."


def _takes_null(tp: Any) -> bool:
    return types.NoneType in options(tp)


def _with_new_names(cls: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What is given under an earlier name of a field, under its name of today."""
    renamed = getattr(cls, "renamed", {})
    names = {old: new for old, new in renamed.items() if isinstance(new, str) and new not in given}
    return {names.get(key, key): value for key, value in given.items()}


def _misplaced(cls: Any, given: dict[Any, Any], path: str) -> Iterator[tuple[str, str]]:
    """Problems with the keys of a section that its dataclass does not have."""
    allowed = list(fields_of(cls))
    removed, renamed = getattr(cls, "removed", {}), getattr(cls, "renamed", {})
    for key, value in given.items():
        where, inner = _join(path, key), value if isinstance(value, dict) else {}
        if key in allowed:
            continue
        new_name = renamed.get(key, {})
        if isinstance(new_name, str):
            yield where, f"is called {new_name} now (given {value!r:.80})."
        elif moved := {old: new for old, new in new_name.items() if old in inner}:
            for old, new in moved.items():
                yield f"{where}.{old}", f"is called {new} now (given {inner[old]!r:.80})."
        elif key not in removed:
            keys = f"Allowed here: {', '.join(allowed)}.{did_you_mean(str(key), allowed)}"
            yield where, f"unknown key (given {value!r:.80}). {keys}"
        elif not _is_off(value, removed[key]):
            yield (
                where,
                f"this option was removed (given {value!r:.80}). A run that used it can only be "
                "resumed with the version that started it; its environment.json names the commit.",
            )


def _is_off(value: Any, off: Any) -> bool:
    if isinstance(off, dict) and isinstance(value, dict):
        return all(value.get(key, switch) == switch for key, switch in off.items())
    return value is None or bool(value == off)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
