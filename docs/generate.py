"""Writes the parts of pages that are made from the code; with `--check` writes nothing and exits 1 where one is stale.

A part is placed between two comments of a page:

    <!-- made: plugins.index -->    kept in the page, so that it reads without the site, and checked
    <!-- site: plugins.reference -->    made for the site alone; the page holds a sentence in its place
    <!-- end -->

`module.function` is one of docs/generators, with its arguments behind it. On the site, each section (`## ...`) between
`<!-- pages -->` and `<!-- end pages -->` is a page of its own (docs/site_hooks.py).
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # for docs/generators, where this file is imported and not run
PART = re.compile(r"(<!-- (made|site): (\w+)\.(\w+)([ \w]*) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)


@cache
def part(module: str, function: str, arguments: str) -> str:
    """Generate the text of a part."""
    blocks = getattr(importlib.import_module(f"generators.{module}"), function)
    return "\n\n".join(blocks(*arguments.split())).strip("\n")


def filled(text: str, site: bool = False) -> str:
    """Regenerate the parts that a page keeps, or for the site all of them, without the comments."""

    def fill(match: re.Match[str]) -> str:
        start, kind, module, function, arguments, kept, end = match.groups()
        if site:
            return (part(module, function, arguments) or kept.strip("\n")) + "\n"
        return f"{start}\n{part(module, function, arguments)}\n\n{end}" if kind == "made" else match[0]

    return PART.sub(fill, text)


def stale(folder: Path = DOCS) -> dict[Path, str]:
    """Return the stale pages with their new texts."""
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(folder.rglob("*.md"))}
    return {page: filled(text) for page, text in pages.items() if filled(text) != text}


def main(folder: Path = DOCS) -> int:
    """Write the pages, or name the stale ones."""
    for page, text in (found := stale(folder)).items():
        if "--check" in sys.argv[1:]:
            print(f"docs/{page.relative_to(folder)} is stale: run `python docs/generate.py`", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
            print(f"wrote docs/{page.relative_to(folder)}")
    return int("--check" in sys.argv[1:] and bool(found))


if __name__ == "__main__":
    sys.exit(main())
