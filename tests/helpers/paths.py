"""Where the repository lies, and what processes that tests start need to import it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"


OUTSIDE = {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}
"""Variables of a process that is not to see the repository."""


def environment(**more: str) -> dict[str, str]:
    """Variables of a process that can import `tests` and `benchmarks`, on one thread."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **more}
