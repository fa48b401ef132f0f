"""Hooks: each with what its plugins must define, and every field of what they see."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from generators.markdown import table
from hf_rlhf import batch
from hf_rlhf.axes import AXES, LISTS, NESTED
from hf_rlhf.contract.base import Plugin
from hf_rlhf.registry import hookspecs

SEEN = ("Prompt", "Completions", "Spans", "TokenScores", "Rollouts", "ReferenceRows", "Scored", "Credit", "Context")
"""Classes of hf_rlhf.batch, in the order of a step."""


def methods() -> Iterator[str]:
    """List the methods that any plugin may override."""
    yield table(["method", "what it does"], _methods(Plugin))


def hooks() -> Iterator[str]:
    """Every hook with what its plugins must define and a complete example."""
    for axis, base in AXES.items():
        yield f"## {axis}\n\n{hookspecs.summary(axis)}"
        many = "inside another plugin" if axis in NESTED else "one in a recipe"
        many = "any number in a recipe" if axis in LISTS else many
        many = "watched for by every run" if base.axis.watches else many
        prefix = base.axis.metric_prefix
        logged = f"metrics of its plugins are logged below `{prefix}/`" if prefix else "its metrics are Trainer's"
        yield f"Base class `{base.__name__}`; {many}; {logged}."
        rows = _methods(base)
        if rows:
            yield table(["method", "what it does"], rows)
        yield f"```python\n{hookspecs.example(axis).strip()}\n```"


def seen() -> Iterator[str]:
    """Every field of what plugins see."""
    shapes = _shapes()
    for name in SEEN:
        cls = getattr(batch, name)
        yield f"### {name}\n\n{' '.join((inspect.getdoc(cls) or '').split())}"
        yield table(["field", "shape or type", "what it is"], _fields(cls, shapes.get(name, {})))
        calls = _methods(cls)
        if calls:
            yield table(["method", "what it gives"], calls)


def _methods(cls: type) -> list[list[str]]:
    """Return the public methods and properties that a class defines itself."""
    rows = []
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if (name.startswith("_") and name != "__call__") or not inspect.isfunction(function):
            continue
        title = name if isinstance(value, property) else f"{name}{_signature(function)}".replace("__call__", "plugin")
        said = " ".join((inspect.getdoc(function) or "").split())
        must = "**must be defined.** " if getattr(function, "__isabstractmethod__", False) else ""
        rows.append([f"`{title}`", must + said])
    return rows


def _signature(function: Any) -> str:
    """Names of the parameters, without annotations."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def _shapes() -> dict[str, dict[str, tuple[str, str]]]:
    """Class -> field -> (shape, meaning), from the first lines of hf_rlhf/batch.py."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    name = field = ""
    for line in (batch.__doc__ or "").splitlines():
        if heading := re.match(r" {4}(\w+) \(", line):
            name = heading[1]
        elif row := re.match(r" {8}(\w+) {2,}(\S.*?)(?: {2,}(\S.*))?$", line):
            field = row[1]
            found.setdefault(name, {})[field] = (row[2], row[3] or "")
        elif (more := re.match(r" {9,}(\S.*?)(?: {2,}(\S.*))?$", line)) and field in found.get(name, {}):
            shape, meaning = found[name][field]
            found[name][field] = (f"{shape} {more[1]}", f"{meaning} {more[2] or ''}".strip())
    return found


def _fields(cls: type, shapes: dict[str, tuple[str, str]]) -> list[list[str]]:
    """Name, shape and meaning of each field; what the module's table leaves out comes from the class."""
    (body,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(body, ast.ClassDef)
    docs = {
        node.target.id: after.value.value
        for node, after in zip(body.body, [*body.body[1:], None], strict=True)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    rows = []
    for field in dataclasses.fields(cls):
        shape, meaning = shapes.get(field.name, (f"`{field.type}`", " ".join(str(docs.get(field.name, "")).split())))
        rows.append([f"`{field.name}`", shape, meaning])
    return rows
