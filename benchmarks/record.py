"""How a benchmark's results are kept: JSON with what they depend on, and a page beside it."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any


def keep(path: Path, command: str, found: dict[str, Any], page: str) -> None:
    """Writes what was `found` with command, machine and versions to `path`, and `page` beside it as Markdown."""
    from hf_rlhf.training.setup import versions

    machine = {"processor": platform.machine(), "system": platform.system()}
    result = {"command": command, "machine": machine, "versions": versions(), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page, encoding="utf-8")
