"""Runs of Weights & Biases, read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.waits import scaled


def inspect(run: Path, *options: str) -> list[dict[str, Any]]:
    """Return the records of a run, or with --summary one object, by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(60))
    if done.returncode and "No such command" in done.stderr:
        pytest.skip("this wandb has no `leet inspect` to read a run back with")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()] if not options else [json.loads(done.stdout)]
