"""Read the settings of dataclasses: documentation and types, and validation by pydantic.

Plugins and sections of a recipe are plain dataclasses, whose authors need nothing of this module.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast

from hf_rlhf.axes import Plugin, axis_of
from hf_rlhf.runtime.errors import did_you_mean

MISSING = dataclasses.MISSING


Function = TypeVar("Function", bound=Callable[..., Any])


def _cached(function: Function) -> Function:
    return cast("Function", functools.cache(function))


class Setting(NamedTuple):
    """A setting as `hf-rlhf show` prints it."""

    name: str
    type: str
    default: str
    doc: str


class Nested(NamedTuple):
    """A field that holds another plugin (`axis`) or a group of settings (`group`); `many`: a list of plugins."""

    axis: str | None
    group: type | None
    many: bool
    optional: bool


def describe(cls: type) -> list[Setting]:
    """Return the settings of a plugin class or section in their order of declaration."""
    docs = setting_docs(cls)
    types_ = setting_types(cls)
    return [
        Setting(field.name, type_text(types_[field.name]), default_text(field), docs.get(field.name, ""))
        for field in settings_of(cls)
    ]


def settings_of(cls: type) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass that can be set."""
    return [field for field in dataclasses.fields(cls) if field.init]


@_cached
def setting_types(cls: type) -> Mapping[str, Any]:
    """Return the type of each setting. Raise `NameError` if a type is imported under TYPE_CHECKING only."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in settings_of(cls)}


@_cached
def setting_docs(cls: type) -> Mapping[str, str]:
    """Return the string below each setting in the source, base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        if "__dataclass_fields__" in base.__dict__ and file and file.endswith(".py"):
            docs |= docs_in_source(Path(file).read_text(encoding="utf-8")).get(base.__qualname__, {})
    return docs


@_cached
def docs_in_source(source: str) -> dict[str, dict[str, str]]:
    """Return class -> setting -> docstring from a module's source; Python does not keep strings below fields."""
    found: dict[str, dict[str, str]] = {}

    def visit(body: list[ast.stmt], scope: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[scope + node.name] = dict(_docs_in_class(node))
                visit(node.body, f"{scope}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                visit(node.body, f"{scope}{node.name}.<locals>.")

    visit(ast.parse(source).body, "")
    return found


def _docs_in_class(node: ast.ClassDef) -> Iterable[tuple[str, str]]:
    for line, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value.value if isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                yield line.target.id, " ".join(text.split())


def nested(hint: Any) -> Nested | None:
    """Return the plugin or group in a type `Base`, `Base | None` or `list[Base]`; None for other types."""
    parts = [part for part in _union(hint) if part is not type(None)]
    if len(parts) != 1:
        return None
    optional = len(_union(hint)) > 1
    part = parts[0]
    many = typing.get_origin(part) is list
    if many:
        (part,) = typing.get_args(part) or (Any,)
    if not isinstance(part, type) or not dataclasses.is_dataclass(part):
        return None
    if not issubclass(part, Plugin):
        return None if many else Nested(None, part, many, optional)
    axis = axis_of(part)
    return Nested(axis, None, many, optional) if axis else None


def _union(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def inner_type(hint: Any, key: str) -> Any:
    """Return the type at `key` of a dataclass, mapping or list that a type holds; None where it is unknown."""
    for part in _union(hint):
        origin, args = typing.get_origin(part), typing.get_args(part)
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            return setting_types(part).get(key)
        if isinstance(origin, type) and issubclass(origin, list | Mapping) and args:
            return args[-1]
    return None


def takes_text(hint: Any) -> bool:
    """Return whether a type has any text among its values."""
    return any(
        (part.__origin__ if typing.get_origin(part) is Annotated else part) in (str, Path) for part in _union(hint)
    )


def accepts(hint: Any, value: Any) -> bool:
    """Return whether `value` is one of a type's, as `checked` reads it."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError:
        return False
    return True


WORDS: dict[Any, str] = {
    float: "number",
    int: "whole number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
    Path: "path",
}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "with length >="}


def type_text(hint: Any) -> str:
    """Return a type in words: `number > 0`, `whole number >= 1 or null`, `one of 'token', 'sequence'`."""
    held = nested(hint)
    if held:
        kind = f"{held.axis} plugin" if held.axis else "group of settings"
        return (f"list of {kind}s" if held.many else kind) + (" or null" if held.optional else "")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [
            f"{sign} {getattr(mark, key):g}"
            for mark in args[1:]
            for key, sign in BOUNDS.items()
            if getattr(mark, key, None) is not None
        ]
        return " ".join([type_text(args[0]), " and ".join(bounds)]).strip()
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin in (list, tuple, set, frozenset):
        return "list of " + type_text(args[0])
    if origin is dict:
        return f"mapping of {type_text(args[0])} to {type_text(args[1])}"
    return str(WORDS.get(hint) or getattr(hint, "__name__", hint))


def default_text(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as a recipe would write it, or `required`."""
    if "use" in field.metadata:
        return str(field.metadata["use"])
    if field.default_factory is not MISSING:
        return plain_text(field.default_factory())
    return "required" if field.default is MISSING else plain_text(field.default)


def plain_text(value: Any) -> str:
    """Return a value as a recipe would write it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Plugin):
        return value.name
    return repr(value)


@_cached
def _adapter(cls: type, name: str) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    return TypeAdapter(setting_types(cls)[name], config=config)


def checked(cls: type, name: str, value: Any) -> Any:
    """Convert `value` to the type of the setting `name`. Raise `ValueError` saying what the setting takes."""
    from pydantic import ValidationError

    hint = setting_types(cls)[name]
    if not (isinstance(value, bool) and not _takes_bool(hint)):
        try:
            return _adapter(cls, name).validate_python(value)
        except ValidationError as error:
            reasons = [detail["msg"] for detail in error.errors() if detail["type"] == "value_error"]
            raise ValueError(_refusal(cls, name, value, "; ".join(reasons))) from error
    raise ValueError(_refusal(cls, name, value, ""))


def plain(cls: type, name: str, value: Any) -> Any:
    """Return a setting's value as numbers, text, lists and mappings, which `checked` converts back."""
    return _adapter(cls, name).dump_python(value, mode="json", fallback=callable_text)


def callable_text(value: Any) -> str:
    """Return `module:name` of a callable, as a recipe file would name it."""
    inner = getattr(value, "func", value)  # functools.partial
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}:{named.__qualname__}"


def _takes_bool(hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(isinstance(arg, bool) for arg in args)
    if origin is Annotated:
        return _takes_bool(args[0])
    if origin in (Union, types.UnionType):
        return any(_takes_bool(arg) for arg in args)
    return hint in (bool, Any, object)


def _refusal(cls: type, name: str, value: Any, reason: str) -> str:
    hint = setting_types(cls)[name]
    field = next(field for field in settings_of(cls) if field.name == name)
    default = default_text(field)
    required = default == "required"
    literals = [part for part in _union(hint) if typing.get_origin(part) is Literal]
    choices = [str(choice) for literal in literals for choice in typing.get_args(literal)]
    parts = [f"got {plain_text(value)}; takes {type_text(hint)}" + ("" if required else f" (default {default})")]
    if reason:
        parts.append(reason)
    if isinstance(value, str):
        parts.append(did_you_mean(value, choices).strip())
    if isinstance(value, dict | list) and takes_text(hint):
        parts.append("Text with ': ', '[' or '{' needs quotes")
    return ". ".join(filter(None, parts))


def at_path(path: str, plugin: Any, text: str) -> str:
    """Return a plugin's message with what it tells to set, as in `Set eps=0.1`, as an override of the recipe: `path.eps=0.1`."""
    names = "|".join(("use", *(x.name for x in settings_of(plugin if isinstance(plugin, type) else type(plugin)))))
    fact, told, advice = re.match(r"(.*?)(\b[Ss]et |$)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return fact + told + re.sub(rf"(?<![\w.{{`/-])((?:{names})(?:\.\w+)*=)", rf"{path}.\1", advice)
