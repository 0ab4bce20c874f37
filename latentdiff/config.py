"""The config engine: YAML file + `a.b=value` overrides → one checked tree of frozen dataclasses.

A configuration is a stdlib dataclass that lives beside the code it configures; each field has a
string literal below it as its documentation. Every mistake in a file is reported in one go, with
its dotted path. Variants of a section are dataclasses, each with a tag `kind: Literal[...]`.
YAML is read as people mean it: 1e-4 is a number, `no` and `off` are words, a key stands only once.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import math
import re
import textwrap
import types
from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from latentdiff.errors import UserError, did_you_mean

MISSING = dataclasses.MISSING


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
        f.name: FieldInfo(f.name, hints[f.name], _default(f), docs.get(f.name, ""))
        for f in dataclasses.fields(cls)
        if f.init
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _field_docs(cls: type) -> dict[str, str]:
    """Read the string literals below the fields from the source, base classes first."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, SyntaxError, TypeError):
            continue  # defined where no source exists (exec, REPL): no docs, nothing else is lost
        class_node = tree.body[0]
        body = class_node.body if isinstance(class_node, ast.ClassDef) else []
        for node, after in itertools.pairwise(body):
            is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_doc:
                docs[node.target.id] = inspect.cleandoc(str(after.value.value))  # type: ignore[attr-defined]
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


_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+"
    r"|[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
# The core schema of YAML 1.2. YAML 1.1, which PyYAML follows, reads 1e-4 as text, `off` as false
# and 12:30 as 750.
_CORE: list[tuple[str, re.Pattern[str], str]] = [
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN"),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"^[-+]?[0-9]+$"), "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
]
#: Values of a configuration with aliases written out; a list of prompts has some thousands.
_MOST_NODES = 100_000
_MOST_BYTES = 2**20
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)
    # Without YAML 1.1's dates, bytes and sets, which a configuration does not know.
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _PLAIN
    }

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error("a key must be a word, not a list or a section", key_node)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _error(f"the key '{key}' stands twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a node has with aliases written out. Raises: yaml.YAMLError: too many."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 0  # until it is known: what is met again within itself has no end
        parts = (part for item in node.value for part in (item if type(item) is tuple else (item,)))
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    count = known[id(node)]
    if not 0 < count <= _MOST_NODES:
        why = f"more than {_MOST_NODES} values" if count else "an alias within what it stands for"
        raise _error(why, node)
    return count


def _error(words: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, words, node.start_mark)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    # Leading zeros are decimal, not octal as in YAML 1.1.
    if len(text) > 40 or not -(2**63) <= int(text) < 2**63:
        raise _error("a whole number of more than 64 bits", node)
    return int(text)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either schema would read as something other than text."""


for _name, _pattern, _first in _CORE:
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_implicit_resolver(_tag, _pattern, ["", *_first] if _name == "null" else [*_first])
    _Dumper.add_implicit_resolver(_tag, _pattern, [*_first])
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document of plain values.

    Raises: yaml.YAMLError: also for what would be endless or huge with its aliases written out.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, TypeError, KeyError) as error:  # a tag such as !!int before other text
        raise yaml.YAMLError(f"a value does not fit its tag ({error})") from error


def to_yaml(data: object) -> str:
    """Write plain data as YAML that `parse_yaml` reads back to the same values."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def to_inline(data: object) -> str:
    """Write plain data as YAML on one line, as an override would give it."""
    text = yaml.dump(data, Dumper=_Dumper, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def read_yaml(path: str | Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML mapping; a top-level `extends: other.yaml` is read first and overlaid.

    Args:   path: the file; `extends` is relative to it.
    Raises: UserError: file missing, not YAML, not a mapping, or extending itself.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(_missing_file(file))
    if file.resolve() in _seen:
        raise UserError(f"config file {file} extends itself. Remove one `extends:` of the circle.")
    if file.stat().st_size > _MOST_BYTES:
        raise UserError(f"config file {file} has more than {_MOST_BYTES // 2**20} MB of text.")
    try:
        data = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {file} is not valid YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"config file {file} must hold `key: value` lines; got {data!r:.80}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise UserError(f"{file}: extends must be one file name; got {parent!r}")
    return merge(read_yaml(file.parent / parent, (*_seen, file.resolve())), data)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Overlay `over` on `base`, mapping by mapping; every other value replaces."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merge(old or {}, value) if both else value
    return result


def _missing_file(file: Path) -> str:
    near = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
    hint = did_you_mean(file.name, near)
    listing = f" YAML files in {file.parent}: {', '.join(sorted(near))}." if near else ""
    return f"config file {file} does not exist.{listing}{hint}"


T = TypeVar("T")
Problems = list[tuple[str, str]]


def too_small(config: object, **least: float) -> list[str]:
    """Complaints about fields of a configuration that are less than they may be."""
    given = {name: getattr(config, name) for name in least}
    return [
        f"{name} must be at least {least[name]}; got {value}."
        for name, value in given.items()
        if value < least[name]
    ]


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


#: Metadata of an option that changes no number of a training: a resumed run may differ in it.
FREE: dict[str, bool] = {"changes_numbers": False}


def decides_numbers(config: Any) -> set[str]:
    """Dotted keys of a configuration, those marked `FREE` left out."""
    found = set[str]()
    for option in dataclasses.fields(config):
        if option.metadata.get("changes_numbers", True):
            value = getattr(config, option.name)
            inner = decides_numbers(value) if dataclasses.is_dataclass(value) else None
            found |= {option.name} if inner is None else {f"{option.name}.{key}" for key in inner}
    return found


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
        if renamed := _renamed(cls, key, value):
            problems += [(_join(path, old), text) for old, text in renamed]
        elif key not in fields and not _had_no_effect(cls, key, value):
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


def _renamed(cls: type, key: Any, value: Any) -> Problems:
    """Say what the keys of a section are called now that a dataclass lists in `renamed`.

    That is a class attribute: old section → its keys → what the error names in their place.
    """
    new: dict[str, str] = getattr(cls, "renamed", {}).get(key, {})
    given = value if isinstance(value, dict) else {}
    return [
        (f"{key}.{old}", f"is called {new[old]} now (given {value!r:.80}).")
        for old, value in given.items()
        if old in new
    ]


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
