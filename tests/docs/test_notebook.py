"""The notebook runs as a reader would run it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

FILE = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_its_runs_learn(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    book = nbformat.read(FILE, as_version=4)
    assert not [cell for cell in book.cells if cell.get("outputs")], "keep outputs out of the repository"
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(x.get("text", "") for cell in book.cells for x in cell.get("outputs", []))
    learned = re.findall(r"held-out problems: ([\d.]+) before, ([\d.]+) after", printed)
    assert len(learned) == 2
    assert all(float(after) > float(before) + 0.1 for before, after in learned)
    tables = [
        x["data"]["text/html"] for cell in book.cells for x in cell.get("outputs", []) if "<table" in str(x.get("data"))
    ]
    assert any("reward/zero_std_frac" in table for table in tables)
    assert any("completion" in table for table in tables)
    assert (tmp_path / "both.html").stat().st_size > 10_000
