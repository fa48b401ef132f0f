"""Variants of one part, timed in turn, and the table that they become."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

Variants = dict[str, Callable[[], Any]]
Part = dict[str, Any]


def in_turn(variants: Variants, times: int, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Return the minimum seconds of each variant; each of several rounds runs all of them."""
    seconds = dict.fromkeys(variants, float("inf"))
    for _ in range(times):
        for name, run in variants.items():
            began = clock()
            run()
            seconds[name] = min(seconds[name], clock() - began)
    return seconds


def apart(found: list[Tensor], due: list[Tensor]) -> float:
    """Return the largest distance of a tensor from its expected value, relative to that."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, due, strict=True))


def part(title: str, text: str, extra: tuple[str, ...], entries: list[Part], compared: bool = True) -> Part:
    """Build a table; ratios are to its first variant, if the variants do the same."""
    base = entries[0]["variant"] if compared else None
    return {"title": title, "text": text, "base": base, "extra": list(extra), "entries": entries}
