"""Files of a run that a report reads, each of which may be missing."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hf_rlhf.config.recipe import Recipe, load_recipe
from hf_rlhf.contract.pattern import Finding
from hf_rlhf.metrics.dashboard import declared
from hf_rlhf.metrics.doctor import diagnose, entries_of
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.run_folder import METRICS, run_in

PAIRS = 8
"""Most pairs of samples, before and after."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The files of one run. Those that were cut off or are missing count as empty."""

    folder: Path
    name: str

    @cached_property
    def recipe_text(self) -> str:
        """Content of recipe.yaml; empty for a run of an `Algorithm` in Python."""
        file = self.folder / "recipe.yaml"
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    @cached_property
    def raw_recipe(self) -> dict[str, Any]:
        """Content of recipe.yaml as mappings and lists."""
        return yaml.safe_load(self.recipe_text) or {}

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe; None where it is missing or its plugins are not installed here."""
        if not self.recipe_text:
            return None
        try:
            return load_recipe(self.folder / "recipe.yaml")
        except (UserError, ValueError) as error:
            logger.warning("%s: panels are made without its recipe. %s", self.folder, str(error).partition("\n")[0])
            return None

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json; empty during the run."""
        file = self.folder / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """Entries of metrics.jsonl."""
        return list(entries_of(self.folder))

    @cached_property
    def rollouts(self) -> list[dict[str, Any]]:
        """Contents of `rollouts/`, in the order of steps."""
        return [
            json.loads(file.read_text(encoding="utf-8")) for file in sorted(self.folder.glob("rollouts/step_*.json"))
        ]

    @cached_property
    def findings(self) -> list[Finding]:
        """Return the findings in summary.json; during the run, those that its log gives now."""
        if "findings" in self.summary:
            return [Finding(**{**row, "overrides": tuple(row["overrides"])}) for row in self.summary["findings"]]
        return diagnose(self.folder, None if self.recipe is None else declared(self.recipe))

    @cached_property
    def pairs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Held-out rows of the first and the last evaluation, evenly spread: (before, after)."""
        paths = sorted(self.folder.glob("evaluation/step_*.parquet"))
        if len(paths) < 2:
            return []
        import pyarrow.parquet as pq

        first, last = (pq.read_table(path) for path in (paths[0], paths[-1]))
        count = min(len(first), len(last))
        chosen = sorted({i * count // PAIRS for i in range(min(PAIRS, count))})
        return list(zip(first.take(chosen).to_pylist(), last.take(chosen).to_pylist(), strict=True))


def read_runs(folders: list[Path]) -> list[RunData]:
    """Return the runs in folders, named by what tells their folders apart. Raises `UserError` for a folder without a run."""
    for folder in folders:
        if not run_in(folder):
            inner = sorted(str(path.parent) for path in folder.glob(f"*/{METRICS}"))
            fix = f"Name its runs: {' '.join(inner)}" if inner else "Name the output folder of a run"
            raise UserError(f"RUN must be a folder with a run, got {folder}, which has no {METRICS}. {fix}")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [RunData(folder, name) for folder, name in zip(folders, names, strict=True)]
