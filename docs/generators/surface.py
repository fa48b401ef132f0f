"""The public surface that plugins may build on, one line per name; docs/api.md records it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from hf_rlhf.axes import AXES
from hf_rlhf.config.algorithm import CORE_PROVIDES, FIXES


def block() -> Iterator[str]:
    """Format the surface for the page."""
    yield f"```text\n{surface()}```"


def surface() -> str:
    """One line for everything public, by module."""
    lines = [
        "entry point groups: hf_rlhf (axis.name = module), hf_rlhf.recipes",
        f"needs: {', '.join(sorted(CORE_PROVIDES | FIXES.keys()))}",
    ]
    for name in ("hf_rlhf", "hf_rlhf.axes", "hf_rlhf.batch", "hf_rlhf.testing"):
        module = importlib.import_module(name)
        lines += ["", f"# {name}", ""]
        for own in sorted(public(module)):
            lines += described(own, getattr(module, own))
    lines += ["", "# hooks, one for each axis, and where the metrics of its plugins stand", ""]
    lines += [
        f"{axis}() -> list[type[{base.__name__}]]    {AXES[axis].axis.metric_prefix or '-'}"
        for axis, base in AXES.items()
    ]
    return "\n".join(lines) + "\n"


def public(module: Any) -> set[str]:
    """Return the public names of a module: `__all__`, otherwise what it defines and, for the axes, what it re-exports."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    found: set[str] = set(getattr(module, "_WITH_TORCH", ()))  # names that are imported on first use
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and module.__name__ == "hf_rlhf.axes":
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and module.__name__ == "hf_rlhf.axes":
            own = (node.module or "").startswith("hf_rlhf")
            found |= {alias.asname or alias.name for alias in node.names} if own else set()
    elsewhere = {name for name in found if getattr(getattr(module, name, None), "__module__", "") == "hf_rlhf.batch"}
    return {name for name in found if not name.startswith("_")} - (
        elsewhere if module.__name__ == "hf_rlhf.axes" else set()
    )


def described(name: str, value: Any) -> Iterator[str]:
    """Format a class with its members, a function with its signature, a constant with its type."""
    if (
        inspect.isclass(value) and value.__module__ == "hf_rlhf.training.trainer"
    ):  # for users of the trainer, not for plugins
        yield f"class {name}{signature(value)}"
    elif inspect.isclass(value):
        bases = [base.__name__ for base in value.__bases__ if base.__name__ not in ("object", "ABC")]
        yield f"class {name}" + (f"({', '.join(bases)})" if bases else "")
        yield from fields_of(value)
        for own in sorted(value.__dict__):
            if own == "__call__" or (not own.startswith("_") and is_member(value, own)):
                yield member(value, own)
    elif inspect.isfunction(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: " + ("str" if name == "__version__" else plain(value))


class Text:
    """An annotation that prints as it is written."""

    def __init__(self, text: Any) -> None:
        self.text = text if isinstance(text, str) else inspect.formatannotation(text)

    def __repr__(self) -> str:
        return self.text


def signature(function: Any) -> str:
    """Return the parameters and the return type, as written."""
    own = inspect.signature(function)
    parameters = [
        each if each.annotation is each.empty else each.replace(annotation=Text(each.annotation))
        for each in own.parameters.values()
    ]
    back = own.return_annotation
    return str(own.replace(parameters=parameters, return_annotation=back if back is own.empty else Text(back)))


def is_member(cls: type, name: str) -> bool:
    """Return True for a method or a property, not the default of a field."""
    kinds = (property, cached_property, classmethod, staticmethod)
    return inspect.isfunction(cls.__dict__[name]) or isinstance(cls.__dict__[name], kinds)


def fields_of(cls: type) -> Iterator[str]:
    """Return the fields and class attributes that a class itself declares."""
    known = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for name, kind in inspect.get_annotations(cls).items():
        if not name.startswith("_"):
            field = known.get(name)
            default = cls.__dict__.get(name, dataclasses.MISSING) if field is None else field.default
            made = field is not None and field.default_factory is not dataclasses.MISSING
            chosen = field.metadata.get("use") if field is not None else None
            text = f" = {chosen!r}" if chosen else " = ..." if made else ""
            if default is not dataclasses.MISSING:
                text = f" = {sorted(default) if isinstance(default, frozenset) else default!r}"
            yield f"    {name}: {kind}{text}"


def member(cls: type, name: str) -> str:
    """Format a property with its type, or a method with its signature."""
    value = inspect.getattr_static(cls, name)
    if isinstance(value, property | cached_property):
        function = value.fget if isinstance(value, property) else value.func
        return f"    {name}: {inspect.signature(function).return_annotation}  (property)"
    function = getattr(value, "__func__", value)
    abstract = "  (abstract)" if getattr(function, "__isabstractmethod__", False) else ""
    return f"    {name}{signature(function)}{abstract}"


def plain(value: Any) -> str:
    """Format a constant as a line: text as it is, others by type."""
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, frozenset):
        return f"frozenset of {', '.join(sorted(value))}"
    if isinstance(value, dict):
        return f"dict of {', '.join(value)}"
    text = repr(value)
    return text if "Annotated" in text or "[" in text else type(value).__name__
