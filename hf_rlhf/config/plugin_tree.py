"""The plugins of a run with their dotted paths, nested ones included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from hf_rlhf.axes import AXES, Plugin


def walk(plugins: Mapping[str, Any]) -> Iterator[tuple[str, Plugin]]:
    """Yield the plugins of a mapping from axes with their dotted paths, nested ones included."""
    for axis in AXES:
        held = plugins.get(axis)
        for path, plugin in (
            [(f"{axis}.{i}", x) for i, x in enumerate(held)] if isinstance(held, list) else [(axis, held)]
        ):
            if plugin is not None:
                yield from with_nested(path, plugin)


def with_nested(path: str, plugin: Plugin) -> Iterator[tuple[str, Plugin]]:
    """Yield a plugin and the plugins among its settings with their dotted paths."""
    yield path, plugin
    for name in _names(type(plugin)):  # type: ignore[arg-type]  # of the class, which is hashable
        value = getattr(plugin, name)
        if isinstance(value, Plugin):
            yield from with_nested(f"{path}.{name}", value)
        elif isinstance(value, list):
            for i, child in enumerate(value):
                if isinstance(child, Plugin):
                    yield from with_nested(f"{path}.{name}.{i}", child)


@cache
def _names(plugin: type[Plugin]) -> tuple[str, ...]:
    """Return the names of a plugin's settings."""
    return tuple(setting.name for setting in fields(plugin))
