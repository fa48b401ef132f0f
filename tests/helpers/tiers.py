"""Which members of a family run in every test run, and which only with `pytest -m slow`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest


def used(value: Any) -> Iterator[str]:
    """The names of the plugins in a recipe, or part of one."""
    if isinstance(value, dict):
        yield from [value["use"]] if "use" in value else []
        value = list(value.values())
    for inner in value if isinstance(value, list) else []:
        yield from used(inner)


def slow(*members: Any) -> list[Any]:
    """Return members that run with `pytest -m slow` alone."""
    return [pytest.param(member, marks=pytest.mark.slow) for member in members]


def tiers(members: Mapping[str, Any]) -> list[Any]:
    """The members as parameters: `slow` are those that name no plugin that an earlier one does not name."""
    seen: set[str] = set()
    found = []
    for name, member in members.items():
        own = set(used(member))
        found.append(name if own - seen else pytest.param(name, marks=pytest.mark.slow))
        seen |= own
    return found
