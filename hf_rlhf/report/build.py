"""Make a report and write it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from hf_rlhf.report import curves, page
from hf_rlhf.report.rollouts import fitted
from hf_rlhf.report.run_data import RunData, read_runs

logger = logging.getLogger(__name__)
FILE = "report.html"
MOST_BYTES = 4_900_000
"""Most that a report may take: completions are left out until it fits."""


def write_report(folders: list[Path], output: Path | None = None) -> Path:
    """Write the report of the runs in `folders`, by default into the first one, and return its path.

    Raises `UserError` for a folder without a run.
    """
    runs = read_runs(folders)
    path = folders[0] / FILE if output is None else output
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(html_of(runs), encoding="utf-8")
    os.replace(draft, path)
    return path


def write_or_warn(folder: Path) -> None:
    """Write the report of a run at its end; a failure is a warning, as no run ends for it."""
    try:
        write_report([folder])
    except Exception as error:
        logger.warning(
            "%s was not written, `hf-rlhf report` tries again. %s: %s", folder / FILE, type(error).__name__, error
        )


def html_of(runs: list[RunData]) -> str:
    """Return the report of some runs."""
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    sections = {name: getattr(page, name)(runs) for name in ("head", "doctor", "results", "plan", "recipe")}
    numbers = [curves.numbers_of(run) for run in runs]
    data = {
        "runs": [run.name for run in runs],
        "curves": [curves.data_of(found) for found in numbers],
        "sections": curves.panels(runs, numbers),
    }
    sections["curves"] = '<div class="controls" id="curve-controls"></div><div id="panels"></div>'
    if any(run.rollouts for run in runs):
        sections["completions"] = '<div class="controls" id="rollout-controls"></div><div id="rollouts"></div>'
    curves_data = page.packed(data)
    room = MOST_BYTES - len(page.page(title, sections, curves_data, "").encode())
    return page.page(title, sections, curves_data, fitted([run.rollouts for run in runs], room))
