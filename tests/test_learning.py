"""The quickstart learns: run with `make test-learning` (about five minutes)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.learning


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_rises_from_a_weak_start_to_92_percent(seed, tmp_path):
    command = [sys.executable, "-m", "hf_rlhf", "train", "quickstart", "--seed", str(seed)]
    subprocess.run([*command, "--output-dir", str(tmp_path / "run")], check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0.20 <= summary["before"]["accuracy"] <= 0.45
    assert summary["after"]["accuracy"] >= 0.92
