"""The lab's page of the whole matrix, which `make lab-page` computes in some minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "lab"
PICTURE = FOLDER / "lab.svg"


def page() -> Iterator[str]:
    """Return the computed page without its title; empty if it was not computed."""
    computed = FOLDER / "lab.md"
    if computed.is_file() and PICTURE.is_file():
        yield computed.read_text(encoding="utf-8").partition("\n\n")[2]
