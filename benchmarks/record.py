"""Storage of a benchmark's results: compact JSON with their provenance, and a Markdown table."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WIDTH = 280
DIGITS = 6


def head(command: str) -> dict[str, Any]:
    """Return the provenance of results: command, machine and versions."""
    from hf_rlhf.runtime.versions import versions

    machine = {"processor": platform.machine(), "system": platform.system()}
    return {"command": command, "machine": machine, "versions": versions()}


def write(path: Path, found: dict[str, Any]) -> None:
    """Write results whole, or leave the old ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(compact(rounded(found)) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def keep(path: Path, command: str, found: dict[str, Any], page: str) -> None:
    """Write what was `found`, under its `head`, to `path`, and `page` beside it as Markdown."""
    write(path, {**head(command), **found})
    path.with_suffix(".md").write_text(page, encoding="utf-8")


def measured(
    name: str,
    doc: str,
    steps: int,
    measure: Callable[[int, list[str]], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Return what `python -m benchmarks.NAME [--steps N] [--json PATH] [KEY=VALUE ...]` measures, kept and printed."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    found = measure(args.steps, args.overrides)
    keep(args.json, f"python -m benchmarks.{name}", {**found, "overrides": args.overrides}, table(found))
    print(table(found))
    return found


def rounded(value: Any) -> Any:
    """Floats to `DIGITS` significant digits, at any depth."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


def compact(value: Any, indent: int = 0) -> str:
    """JSON with as much on a line as fits into `WIDTH`, the whole container if possible."""
    text = json.dumps(value)
    if indent + len(text) <= WIDTH or not isinstance(value, dict | list):
        return text
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    lines: list[str] = []
    for name, x in zip(names, value.values() if isinstance(value, dict) else value, strict=True):
        item = name + compact(x, indent + 1)
        joined = f"{lines[-1]}, {item}" if lines and names[0] else ""
        if joined and "\n" not in joined and indent + len(joined) + 2 <= WIDTH:
            lines[-1] = joined
        else:
            lines.append(item)
    start, end = "{}" if isinstance(value, dict) else "[]"
    space = "\n" + " " * (indent + 1)
    return start + space + ("," + space).join(lines) + "\n" + " " * indent + end
