"""Declare an axis: its place in a recipe, in metric names and on dashboards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Properties of an axis, declared once on its base class and read by everything that iterates over `AXES`."""

    section: str
    """Heading of its metrics on dashboards; axes with the same heading share a section."""
    metric_prefix: str
    """Prefix of its plugins' own metrics. `<label>` stands for the label of a reward source, otherwise for the plugin's name;
    the second plugin of a name is `<name>_2`. Empty: the metrics have the names that a trainer's library logs."""
    many: bool = False
    """True where a recipe has a list of plugins."""
    default: str | tuple[()] | None = None
    """Plugin of a recipe that leaves the axis out, `()` for an empty list; None: the recipe must choose."""
    nested: str = ""
    """An example in a recipe, for an axis whose plugins are settings of other plugins; empty for a key of a recipe."""
