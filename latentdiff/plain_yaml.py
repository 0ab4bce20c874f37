"""YAML as people mean it, out of files that anybody may have made.

1e-4 is a number, `no` and `off` are words, 007 is seven, and a key stands only once. There are no
dates, bytes or objects, and what would be endless or huge with its aliases written out is refused.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from latentdiff.errors import UserError, did_you_mean

#: Values of a configuration with aliases written out; a list of prompts has some thousands.
_MOST_NODES = 100_000
_MOST_BYTES = 2**20
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_FLOAT = (
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+"
    r"|[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
#: The core schema of YAML 1.2: name, what is read as it, and with which characters that begins.
#: YAML 1.1, which PyYAML follows, reads 1e-4 as text, `off` as false and 12:30 as 750.
_CORE = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["", "~", "n", "N"]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"^[-+]?[0-9]+$", [*"-+0123456789"]),
    ("float", _FLOAT, [*"-+.0123456789"]),
)


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

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        # Leading zeros are decimal, not octal as in YAML 1.1.
        if len(text) > 40 or not -(2**63) <= int(text) < 2**63:
            raise _error("a whole number of more than 64 bits", node)
        return int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either schema would read as something other than text."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _name, _pattern, _first in _CORE:
    for _either in (_Loader, _Dumper):
        _either.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


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
    return _overlaid(read_yaml(file.parent / parent, (*_seen, file.resolve())), data)


def _overlaid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` over `base`, mapping by mapping; every other value replaces."""
    merged = {
        key: _overlaid(base[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | over | merged


def _missing_file(file: Path) -> str:
    near = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
    hint = did_you_mean(file.name, near)
    listing = f" YAML files in {file.parent}: {', '.join(sorted(near))}." if near else ""
    return f"config file {file} does not exist.{listing}{hint}"
