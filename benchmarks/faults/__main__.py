"""Inject every fault of the table, or the rows that are named, and print what happened.

`python -m benchmarks.faults [ROW ...] [--write]`

Each row runs `hf-rlhf` in processes of its own: killed ones, full disks, servers that stall. `--write` writes the results to
benchmarks/results/faults.json and docs/faults.md. A row that cannot run on this machine is reported, and is a failure where
the environment has CI=true.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.faults.page import save
from benchmarks.faults.table import FAULTS, verdict


def main() -> int:
    """Run the rows and print a line for each. Return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, metavar="ROW", help="its number")
    parser.add_argument("--write", action="store_true", help="write the results and the page")
    asked = parser.parse_args()
    found = []
    for number in asked.rows or FAULTS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            passed, happened = verdict(number, Path(folder))
        row = FAULTS[number]
        print(f"{number:>2} {passed:<10} {row.title}: {happened} ({time.monotonic() - started:.1f} s)", flush=True)
        found.append({"row": number, "verdict": passed, "happened": happened})
    counts = {kind: sum(row["verdict"] == kind for row in found) for kind in ("pass", "fail", "cannot run")}
    print(", ".join(f"{count} {kind}" for kind, count in counts.items() if count))
    if asked.write:
        save(found)
    return int(counts["fail"] > 0)


if __name__ == "__main__":
    sys.exit(main())
