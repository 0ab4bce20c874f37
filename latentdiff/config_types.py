"""What a configuration dataclass declares: its fields, their types, defaults, docs and limits."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

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
    """List the dataclasses that a field's type allows (several: variants told apart by `kind`)."""
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


def too_small(config: object, **least: float) -> list[str]:
    """Complaints about fields of a configuration that are less than they may be."""
    given = {name: getattr(config, name) for name in least}
    return [
        f"{name} must be at least {least[name]}; got {value}."
        for name, value in given.items()
        if value < least[name]
    ]
