"""Bites of what is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runs
from bites import BITES, Bite


def names_logged(folder: Path, value: Any) -> list[str]:
    made = runs.trained(folder, logging={"metric_aliases": value}, training={"max_steps": 1})
    return sorted(made.state.log_history[0])


BITES["logging.metric_aliases"] = Bite("none", "trl", names_logged)
