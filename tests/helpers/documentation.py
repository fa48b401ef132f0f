"""What makes the documentation, and its pages as the site shows them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from tests.helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import generate
from generators import proofs, surface

__all__ = ["generate", "proofs", "shown", "surface"]


@cache
def shown(page: Path) -> str:
    """A page with the parts that are made for the site alone."""
    return generate.filled(page.read_text(encoding="utf-8"), site=True)
