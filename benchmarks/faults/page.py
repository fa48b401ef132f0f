"""docs/faults.md and benchmarks/results/faults.json from what happened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.faults.table import FAULTS
from benchmarks.pages import markdown
from benchmarks.record import head, write

ROOT = Path(__file__).parents[2]
COMMAND = "python -m benchmarks.faults --write"
TEXT = """# Faults

<!-- Made by `{command}` from benchmarks/results/faults.json. -->

Each row is a fault that is injected into a real run: `hf-rlhf` in a process of its own, with a tiny model, killed processes,
full disks and servers that stall. `python -m benchmarks.faults` repeats them all, `python -m benchmarks.faults 35 41` some;
the rows are tests as well. "The weights of a quiet run" means equal SHA-256. TRL's behaviour was tried with TRL 1.16.0 or
read in its source.

{table}

Row 47, an inference server that is down, slow, started again or answers half, is tried with [vLLM](vllm.md) and not here:
tests/integration/test_engine_weights.py and tests/unit/plugins/test_vllm.py with a server that speaks as vLLM does,
tests/engine/test_vllm.py with a real one that is killed.
"""


def save(found: list[dict[str, Any]]) -> None:
    """Write the results and the page."""
    write(ROOT / "benchmarks" / "results" / "faults.json", {**head(COMMAND), "rows": found})
    header = ["", "fault", "hf_rlhf must", "verdict", "what happened", "TRL 1.16"]
    rows = [
        [str(row["row"]), fault.title, fault.must, row["verdict"], plain(row["happened"]), fault.trl]
        for row in found
        if (fault := FAULTS[row["row"]])
    ]
    page = TEXT.format(command=COMMAND, table=markdown(header, rows))
    (ROOT / "docs" / "faults.md").write_text(page, encoding="utf-8")


def plain(text: str) -> str:
    """Return the first line of a message as a cell of a table, without the folder that it ran in."""
    line = re.sub(r"/tmp/\w+/", "", text.splitlines()[0] if text else "")
    return (line if len(line) <= 160 else line[:157] + "...").replace("|", r"\|").replace("<", "&lt;")
