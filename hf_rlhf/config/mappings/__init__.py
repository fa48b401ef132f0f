"""Settings of TRL, verl and OpenRLHF, and what they are here: the tables of the guides, which error messages quote.

A table of three columns holds their names, recipe keys and notes; one of two columns holds former names and present ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hf_rlhf.runtime.errors import did_you_mean

SYSTEMS = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF"}
SHOWN = 4
"""Most rows in a message."""


class Row(NamedTuple):
    """A row of a table."""

    source: str
    """The library, with the configuration class where it has several."""
    names: list[str]
    text: str
    """Names, recipe keys and notes as a message says them."""


def section(system: str, title: str) -> str:
    """Return a table as Markdown."""
    text = Path(__file__).with_name(f"{system}.md").read_text(encoding="utf-8")
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0].strip("\n")


def meaning(word: str, choices: Iterable[str]) -> str:
    """Return what a name that is not among the choices means in another library, or else the choices near it."""
    return mapped(word) or did_you_mean(word, choices)


def mapped(name: str, whole: bool = False) -> str:
    """Return the rows for a setting of another library, empty if there is none.

    It may be given with or without the groups around it; with `whole`, only under its name in the table.
    """
    plain = name.lstrip("+").replace("-", "_").strip("_")
    matching = [row for row in rows() if plain in row.names] if whole else _matching(plain)
    found = {row.text: row for row in matching}
    if not found:
        return ""
    lines = "".join(f"\n    {row.source}: {text}" for text, row in list(found.items())[:SHOWN])
    return f" It is a setting of another library; the same here:{lines}\n "


def _matching(name: str) -> list[Row]:
    """Return the rows with the longest name inside `name`, else those with a name that ends in it."""
    inside = [(len(own), row) for row in rows() for own in row.names if f".{own}." in f".{name}."]
    longest = max((length for length, _ in inside), default=0)
    return [row for length, row in inside if length == longest] or [
        row for row in rows() if any(own.endswith(f".{name}") for own in row.names)
    ]


@cache
def rows() -> list[Row]:
    """Return the rows of all tables; former names have the row of the present one."""
    found, former = [], dict[str, list[str]]()
    for system, library in SYSTEMS.items():
        text = Path(__file__).with_name(f"{system}.md").read_text(encoding="utf-8")
        for title, cells in _lines(text):
            names = [word.strip("-") for word in re.findall(r"`([^`]+)`", cells[0])]
            if len(cells) == 2:
                for now in re.findall(r"`-*([^`]+)`", cells[1]):
                    former.setdefault(now, []).extend(names)
                continue
            said = "; ".join(re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", cell) for cell in cells[1:] if cell)
            source = f"{library}'s {title}" if system == "trl" else library
            found.append(Row(source, names, f"{', '.join(names)} -> {said}".replace("`", "")))
    return [
        row._replace(names=[*row.names, *(old for own in row.names for old in former.get(own, ()))]) for row in found
    ]


def _lines(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the section and the cells of each row below a table's head."""
    title = ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("| `"):
            yield title, [cell.strip() for cell in line.strip("|").split("|")]
