"""The run doctor: watch the log of a run for the installed patterns, and say once what is wrong."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_rlhf.config.recipe import load_plugin
from hf_rlhf.config.recipe_yaml import read_yaml
from hf_rlhf.contract.metric import Metric
from hf_rlhf.contract.pattern import Finding, History, Pattern, Source
from hf_rlhf.metrics import CORE, EVALUATION, OFFLINE, OFFLINE_EVALUATION
from hf_rlhf.metrics.catalog import EVAL
from hf_rlhf.metrics.names import Named
from hf_rlhf.registry.discovery import PluginError
from hf_rlhf.registry.host import get_host

logger = logging.getLogger(__name__)
AXIS = "doctor"
NUMBER = (int, float)
FIRST, EVERY = 50, 5
"""Entries of the log after each of which patterns are looked for; then after every so many."""


class Doctor:
    """Patterns, and the history of one run that they are looked for in.

    They are looked for after each of the first 50 entries of the log, then after every fifth, and after each that is not of an
    optimizer step: an evaluation, or the end of training. That depends on the log alone, so that reading it later finds the same.
    """

    def __init__(
        self, recipe: Mapping[str, Any], ranges: Mapping[str, Metric], patterns: Iterable[Pattern] | None = None
    ):
        self.patterns = list(installed() if patterns is None else patterns)
        covered = {name for pattern in self.patterns for name in pattern.covers}
        ranges = {name: metric for name, metric in ranges.items() if metric.healthy and name not in covered}
        self.history = History(recipe=recipe, ranges=ranges, sources=sources_of(recipe))
        self.findings: list[Finding] = []
        self._entries = 0
        self._unread: list[tuple[int, dict[str, Any]]] = []
        """Entries that are not in the history yet."""

    def add(self, step: int, numbers: Mapping[str, Any]) -> list[Finding]:
        """Take an entry of the log and return what is found for the first time."""
        self._entries += 1
        self._unread.append((step, dict(numbers)))
        due = self._entries <= FIRST or self._entries % EVERY == 0 or "learning_rate" not in numbers
        return self.look() if due else []

    def look(self) -> list[Finding]:
        """Look for the patterns in what was taken so far, and return what is found for the first time."""
        for step, entry in self._unread:
            numbers = {name: x for name, x in entry.items() if isinstance(x, NUMBER) and math.isfinite(x)}
            self.history.add(step, numbers)
        self._unread.clear()
        known = {(finding.pattern, finding.metric) for finding in self.findings}
        new = [each for pattern in list(self.patterns) for each in self._ask(pattern)]
        new = [finding for finding in new if (finding.pattern, finding.metric) not in known]
        self.findings += new
        return new

    def _ask(self, pattern: Pattern) -> list[Finding]:
        """Return what a pattern finds; one that raises is dropped, as no run ends for it."""
        try:
            return list(pattern.find(self.history))
        except Exception as error:
            self.patterns.remove(pattern)
            logger.warning("doctor.%s failed and is left out. %s: %s", pattern.name, type(error).__name__, error)
            return []


def installed() -> Iterator[Pattern]:
    """Yield every installed pattern that is not turned off; one that cannot be used is left out with a warning."""
    for offer in get_host().offers(AXIS):
        if offer.problem is None:
            try:
                yield load_plugin(AXIS, f"{offer.package}/{offer.name}")
            except PluginError as error:
                logger.warning("%s is left out: %s", f"{AXIS}.{offer.name}", error)


def sources_of(recipe: Mapping[str, Any]) -> dict[str, Source]:
    """Map the label of each reward source of a resolved recipe to what patterns see of it."""
    found = {}
    for place, settings in enumerate(recipe.get("rewards") or ()):
        try:
            cls: Any = get_host().get("rewards", settings["use"])
        except PluginError:  # of a package that is not installed here
            cls = None
        found[settings.get("label") or settings["use"].rpartition("/")[2]] = Source(
            place=place,
            weight=settings.get("weight", 1.0),
            verifier=getattr(cls, "verifier", False) is True,
            penalty=getattr(cls, "penalty", False) is True,
        )
    return found


def diagnose(run_folder: Path, declared: Sequence[Named] | None = None) -> list[Finding]:
    """Return what the log of a run tells is wrong with it, in the order of its steps.

    Reads metrics.jsonl, recipe.yaml and summary.json. `declared`: metrics with their healthy ranges, by default those of the
    core; findings of the run itself, in summary.json, are kept.
    """
    doctor = Doctor(recipe_of(run_folder), core_ranges() if declared is None else ranges_of(declared))
    for entry in entries_of(run_folder):
        doctor.add(int(entry.pop("step")), entry)
    doctor.look()  # of a run that goes on, or died
    on = {pattern.name for pattern in doctor.patterns}
    known = {(finding.pattern, finding.metric) for finding in doctor.findings}
    kept = [x for x in _recorded(run_folder) if x.pattern in on and (x.pattern, x.metric) not in known]
    return sorted([*doctor.findings, *kept], key=lambda finding: finding.step)


def recipe_of(run_folder: Path) -> dict[str, Any]:
    """Return the resolved recipe of a run; empty if it has none."""
    file = run_folder / "recipe.yaml"
    return (read_yaml(file.read_text(encoding="utf-8"), str(file)) or {}) if file.is_file() else {}


def entries_of(run_folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of metrics.jsonl; a line that was cut off is left out."""
    file = run_folder / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            yield entry


def core_ranges() -> dict[str, Metric]:
    """Return the core's metrics, those of evaluations by their full names."""
    held_out = {f"{EVAL}{metric.name}": metric for metric in (*EVALUATION, *OFFLINE_EVALUATION)}
    return {**{metric.name: metric for metric in (*CORE, *OFFLINE)}, **held_out}


def ranges_of(declared: Iterable[Named]) -> dict[str, Metric]:
    """Map the full names of metrics to their declarations."""
    return {named.name: named.metric for named in declared}


def as_dict(finding: Finding) -> dict[str, Any]:
    """Return a finding as summary.json holds it."""
    return {**vars(finding), "overrides": list(finding.overrides)}


def _recorded(run_folder: Path) -> list[Finding]:
    file = run_folder / "summary.json"
    rows = json.loads(file.read_text(encoding="utf-8")).get("findings") or [] if file.is_file() else []
    return [Finding(**{**row, "overrides": tuple(row["overrides"])}) for row in rows]
