"""Time limits that grow with the load of the machine: written for an idle one, they hold on one that others use too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

PATIENCE = float(os.environ.get("TEST_PATIENCE", "1"))
"""Factor of every limit, for machines that are slow for another reason than their load."""


def scaled(seconds: float) -> float:
    """Return a limit for this moment: processes that wait for a core, per core, lengthen it, and at least twofold."""
    return seconds * PATIENCE * (1 + max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def until(condition: Callable[[], Any], seconds: float, pause: float = 0.01, what: str = "") -> None:
    """Wait until a condition holds. Raises `AssertionError` after `scaled(seconds)`, reckoned anew while it waits."""
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        assert waited < scaled(seconds), f"{what or 'nothing happened'} within {waited:.0f} s"
        time.sleep(pause)
