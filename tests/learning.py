"""The learning benchmark, which lies beside the tests and is no part of an installed package."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks import fits, learning, pages  # noqa: E402

__all__ = ["fits", "learning", "pages"]
