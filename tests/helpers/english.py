"""Turns of phrase that docstrings, messages and pages avoid; `python -m tests.helpers.english` lists what it finds."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("hf_rlhf", "plugins", "benchmarks", "examples", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "examples")

BANNED = re.compile(
    r"\b(?:is due|are due|mend(?:ed|s|ing)?|anew|go(?:es)? on with|equal bits|the same bits|stands? in|what it says"
    r"|say it there|is spoken here|to the bit"
    r"|(?<!there )(?<!There )is no (?!longer\b|more\b|less\b|such\b)[a-z]+[;:,])"
)
"""Anywhere in a docstring, a message or a page: see the examples in `tests/docs/test_english.py`."""
FIRST = re.compile(r"(?:What|Where|How|Whether|Why|Of|Its|Their)\b")
"""At the start of a docstring: an imperative verb, or for classes, settings and properties a noun, says more."""


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield every docstring, those after assignments included."""
    for node in ast.walk(tree):
        body = getattr(node, "body", ())
        for statement in body if isinstance(body, list) else ():
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def in_code(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, problem) for the docstrings and string literals of a module."""
    tree = ast.parse(text)
    for node in docstrings(tree):
        if found := FIRST.match(node.value.lstrip()):  # type: ignore[union-attr]
            yield node.lineno, f"a docstring begins with {found[0]!r}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for found in BANNED.finditer(re.sub(r"\s+", " ", node.value)):
                yield node.lineno, repr(found[0])


def in_page(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, problem) for the prose of a Markdown page, without its code blocks."""
    prose = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for number, line in enumerate(prose.splitlines(), 1):
        for found in BANNED.finditer(line):
            yield number, repr(found[0])


def problems(place: str) -> list[str]:
    """Return the problems in a file or folder of the repository as `FILE:LINE: problem`."""
    start = ROOT / place
    files = sorted([*start.rglob("*.py"), *start.rglob("*.md")]) if start.is_dir() else [start]
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        pairs = in_code(text) if file.suffix == ".py" else in_page(text)
        found += [f"{file.relative_to(ROOT)}:{line}: {problem}" for line, problem in pairs]
    return found


if __name__ == "__main__":
    places = sys.argv[1:] or [place for place in dict.fromkeys((*CODE, *PAGES)) if (ROOT / place).exists()]
    everything = [problem for place in places for problem in problems(place)]
    print("\n".join(everything))
    sys.exit(bool(everything))
