"""YAML as people mean it: 1e-4 is a number, `no` and `off` are words, a key may stand only once."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from latentdiff.errors import UserError, did_you_mean

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


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either schema would read as something other than text."""


for _name, _pattern, _first in _CORE:
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_implicit_resolver(_tag, _pattern, ["", *_first] if _name == "null" else [*_first])
    _Dumper.add_implicit_resolver(_tag, _pattern, [*_first])
# Leading zeros are decimal, not octal as in YAML 1.1.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda _, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan")),
)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document. Raises: yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


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
    try:
        data = parse_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
