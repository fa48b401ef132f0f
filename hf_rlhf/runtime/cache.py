"""The folder for files that belong to no run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $HF_RLHF_CACHE, or ~/.cache/hf_rlhf."""
    return Path(os.environ.get("HF_RLHF_CACHE") or Path.home() / ".cache" / "hf_rlhf").expanduser()
