"""Curves of a report: the panels of the runs' dashboards, and the numbers of metrics.jsonl in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hf_rlhf.contract.metric import Metric
from hf_rlhf.metrics import CORE, EVALUATION, OFFLINE, OFFLINE_EVALUATION, pattern
from hf_rlhf.metrics.catalog import EVAL
from hf_rlhf.metrics.dashboard import EVALUATION as HELD_OUT
from hf_rlhf.metrics.dashboard import (
    HIDDEN,
    OF_AREA,
    ORDER,
    OVERVIEW,
    Panel,
    declared,
    headlines,
    panels_of,
    sections_of,
)
from hf_rlhf.metrics.names import ONCE, Named, tracked
from hf_rlhf.report.run_data import RunData

MOST_POINTS = 1_000
"""Points of a curve: of a longer one, lowest and highest of each stretch are kept."""
OTHER = "Other"


def numbers_of(run: RunData) -> dict[str, tuple[list[int], list[float]]]:
    """Return the steps and values of each metric; of two values at a step, the later."""
    found: dict[str, dict[int, float]] = {}
    for entry in run.entries:
        for name, x in entry.items():
            if name != "step" and isinstance(x, int | float) and math.isfinite(x):
                found.setdefault(name, {})[entry["step"]] = x
    return {name: (list(values), list(values.values())) for name, values in found.items()}


def data_of(numbers: dict[str, tuple[list[int], list[float]]]) -> dict[str, Any]:
    """Return the curves as JSON: `metrics` maps a name to (index in `steps`, values)."""
    steps: dict[tuple[int, ...], int] = {}
    metrics = {}
    for name, (xs, ys) in numbers.items():
        x, y = _thinned(xs, ys)
        metrics[name] = [steps.setdefault(tuple(x), len(steps)), [float(f"{value:.5g}") for value in y]]
    return {"steps": [list(x) for x in steps], "metrics": metrics}


def _thinned(xs: list[int], ys: list[float]) -> tuple[list[int], list[float]]:
    """Return at most about `MOST_POINTS` points with the extremes of each stretch, and the last one."""
    if len(xs) <= MOST_POINTS:
        return xs, ys
    width = math.ceil(2 * len(xs) / MOST_POINTS)
    kept = {len(xs) - 1}
    for start in range(0, len(xs), width):
        stretch = range(start, min(start + width, len(xs)))
        kept |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}
    order = sorted(kept)
    return [xs[i] for i in order], [ys[i] for i in order]


def panels(runs: list[RunData], logged: Sequence[Iterable[str]]) -> list[dict[str, Any]]:
    """Return the sections with their panels as JSON, in the order of dashboards; panels without a number are left out."""
    names = set().union(*logged)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run, own in zip(runs, logged, strict=True):
        for section, panel, meanings in _sections(run, sorted(own)):
            metrics = [name for name in map(_untracked, panel.metrics) if name in names]
            if not metrics:
                continue
            title = panel.title.partition(", healthy ")[0]
            known = found.setdefault(section, {}).setdefault(title, _as_json(panel, title, metrics, meanings))
            known["metrics"] += [name for name in metrics if name not in known["metrics"]]
    order = {name: place for place, name in enumerate((*ORDER, OTHER))}
    return [
        {"name": section, "panels": list(members.values())}
        for section, members in sorted(found.items(), key=lambda item: order.get(item[0], len(order)))
    ]


def _as_json(panel: Panel, title: str, metrics: list[str], meanings: dict[str, Metric]) -> dict[str, Any]:
    first = meanings.get(metrics[0], Metric("", "", ""))
    meaning = first.meaning if len(metrics) == 1 else ""
    return {
        "title": title,
        "metrics": metrics,
        "healthy": panel.healthy,
        "axis": panel.axis,
        "smoothed": panel.smoothed,
        "meaning": meaning,
        "unhealthy": first.unhealthy,
    }


def _sections(run: RunData, logged: list[str]) -> Iterator[tuple[str, Panel, dict[str, Metric]]]:
    """Yield (section, panel, declarations by name) of a run, and what it logged besides."""
    shown: set[str] = set()
    if run.recipe is not None:
        meanings = {named.name: named.metric for named in declared(run.recipe)}
        for section in sections_of(run.recipe):
            for panel in section.panels:
                shown |= set(map(_untracked, panel.metrics))
                yield section.name, panel, meanings
    rest = [
        Named(name, _declaration(name), "")
        for name in logged
        if name not in shown | ONCE | {"grad_norm"}
        and not HIDDEN.fullmatch(name)
        and not name.endswith(("_low", "_high"))
    ]
    meanings = {named.name: named.metric for named in rest}
    if run.recipe is None:
        for panel in panels_of(headlines(rest), stacked=False, alone=True):
            yield OVERVIEW, panel, meanings
    by_section: dict[str, list[Named]] = {}
    for named in rest:
        by_section.setdefault(_section(named.name), []).append(named)
    for name, members in by_section.items():
        for panel in panels_of(members, stacked=False):
            yield name, panel, meanings


def _section(name: str) -> str:
    """Return the section of a metric that no recipe declares, by its name."""
    if name.startswith(EVAL):
        return HELD_OUT
    area, slash, _ = name.partition("/")
    return OF_AREA.get(area, OTHER) if slash else OTHER


def _declaration(name: str) -> Metric:
    """Return the core's declaration of a metric, or an empty one."""
    bare = name.removeprefix(EVAL)
    core: tuple[Metric, ...] = (*EVALUATION, *OFFLINE_EVALUATION) if bare != name else (*CORE, *OFFLINE)
    return next((metric for metric in core if pattern(metric.name).fullmatch(bare)), Metric(name, "", ""))


def _untracked(name: str) -> str:
    """Return the logged name of a metric in a dashboard: the inverse of `tracked`."""
    area, _, rest = name.partition("/")
    found = {"train": rest, "eval": f"{EVAL}{rest}"}.get(area, name)
    assert tracked(found) == name
    return found
