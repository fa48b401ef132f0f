"""Declare an axis: its place in a recipe, in metric names and on dashboards, and what its plugins return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


def _single(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"": value}, {}


@dataclass(frozen=True, kw_only=True)
class Output:
    """Declaration of a method's result: tensors in the input's dtype and on its device. The core checks it in every run."""

    text: str
    """Name of what it must return, for error messages."""
    shapes: tuple[str, ...] = ("(N, T)",)
    """Allowed shapes of each tensor. T stands for the input's last size, another letter for its first; (...) for its shape."""
    kind: Literal["float", "floating", "bool", "number", "module", "optimizer"] = "float"
    """Tensors of float32 or float64 (floating: of any floating-point dtype), or of bool; or another object."""
    gradient: bool = False
    """True if the first tensor must have a gradient wherever an input has one."""
    skips: bool = False
    """True if numbers that are not finite cost the optimizer step alone; otherwise they end the run."""
    parts: Callable[[Any], tuple[dict[str, Any], dict[str, Any]] | None] = _single
    """Return the named tensors and the metrics in a result, or None if it is something else."""
    metric_shapes: tuple[str, ...] = ()
    """Allowed shapes of metrics; `number`: a Python number."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Properties of an axis, declared once on its base class and read by everything that iterates over `AXES`."""

    section: str
    """Heading of its metrics on dashboards; axes with the same heading share a section."""
    metric_prefix: str
    """Prefix of its plugins' own metrics. `<label>` stands for the label of a reward source, otherwise for the plugin's name;
    the second plugin of a name is `<name>_2`. Empty: the metrics have the names that a trainer's library logs."""
    many: bool = False
    """True where a recipe has a list of plugins; it may write one in place of a list of one."""
    default: str | tuple[()] | None = None
    """Plugin of a recipe that leaves the axis out, `()` for an empty list; None: the recipe must choose."""
    watches: bool = False
    """True where every run uses the installed plugins, those that are turned off apart: not a key of recipes."""
    nested: str = ""
    """An example in a recipe, for an axis whose plugins are settings of other plugins; empty for a key of a recipe."""
    outputs: Mapping[str, Output] = field(default_factory=dict)
    """Method -> what it returns, checked by `hf_rlhf.contract.outputs`."""
