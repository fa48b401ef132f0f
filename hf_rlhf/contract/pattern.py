"""Base class of the axis `doctor`: a pattern in the log of a run that goes wrong, and what it is found in."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from statistics import fmean
from typing import Any, ClassVar

from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Plugin
from hf_rlhf.contract.metric import Metric, pattern

ENTRIES = 5
"""Entries of the log in a row that make a pattern: one bad step is none."""
LEARNED = 0.9
"""Mean score, of a source whose scores lie in [0, 1], from which on a task counts as learned if it began below."""
KEPT = 200
"""Last values of a metric that a history keeps."""
_LABEL = re.compile(r"reward/([^/]+)/mean")


@dataclass(frozen=True)
class Finding:
    """A pattern found in a run, once for each metric."""

    pattern: str
    """Name of the pattern."""
    step: int
    """Optimizer step since when it holds."""
    text: str
    """Description in plain words, with the numbers."""
    overrides: tuple[str, ...] = ()
    """Overrides of the recipe to type, together or one by one."""
    metric: str = ""
    """Metric that it is about, or that shows it best."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A reward source of the recipe, as patterns see it."""

    place: int
    """Place in the list `rewards`."""
    weight: float = 1.0
    verifier: bool = False
    penalty: bool = False


class Series:
    """Values of a metric: the first ones, the last ones, and the extremes of all."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.last: deque[tuple[int, float]] = deque(maxlen=KEPT)
        """(optimizer step, value)"""
        self.low, self.high = math.inf, -math.inf

    def add(self, step: int, value: float) -> None:
        """Append a value."""
        if len(self.first) < ENTRIES:
            self.first.append(value)
        self.last.append((step, value))
        if value < self.low:  # a comparison costs less than min() and max(), and there are many metrics
            self.low = value
        if value > self.high:
            self.high = value


@dataclass(kw_only=True)
class History:
    """Values that a run has logged so far, by metric, and its recipe with every setting, as in recipe.yaml."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, Metric] = field(default_factory=dict)
    """Metrics with a healthy range that no other pattern covers; a part of a name in angle brackets stands for any text
    without `/`."""
    sources: Mapping[str, Source] = field(default_factory=dict)
    """Label -> reward source."""
    step: int = 0
    """Optimizer step of the last entry."""
    series: dict[str, Series] = field(default_factory=dict)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append an entry of the log."""
        self.step = step
        for name, value in numbers.items():
            series = self.series.get(name)
            if series is None:
                series = self.series[name] = Series()
            series.add(step, value)

    def values(self, name: str, entries: int = KEPT) -> list[float]:
        """Return the last values of a metric; empty if it was not logged."""
        newest = islice(reversed(self.series[name].last), entries) if name in self.series else ()
        return [value for _, value in newest][::-1]

    def mean(self, name: str, entries: int = ENTRIES) -> float:
        """Return the mean of the last values of a metric, NaN if it was not logged."""
        return fmean(self.values(name, entries)) if name in self.series else math.nan

    def first(self, name: str) -> float:
        """Return the mean of the first values of a metric, NaN if it was not logged."""
        return fmean(self.series[name].first) if name in self.series else math.nan

    def since(self, name: str, wrong: Callable[[float], bool], entries: int = ENTRIES) -> int | None:
        """Return the step since when a metric is `wrong` in every rollout; None if that are fewer than `entries`.

        Several optimizer steps on one rollout count as their mean.
        """
        start, count = None, 0
        logged = reversed(self.series[name].last if name in self.series else ())
        for _, rollout in groupby(logged, lambda entry: (entry[0] - 1) // self.steps_per_rollout):
            steps, values = zip(*rollout, strict=True)
            if not wrong(fmean(values)):
                break
            start, count = min(steps), count + 1
        return start if count >= entries else None

    @cached_property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        update = self.recipe.get("update") or {}
        return int(update.get("mini_batches", 1)) * int(update.get("epochs", 1))

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the recipe, otherwise the highest one so far; None if there is none."""
        given = (self.recipe.get("training") or {}).get("learning_rate")
        logged = self.series["learning_rate"].high if "learning_rate" in self.series else None
        return logged if given is None else float(given)

    @property
    def labels(self) -> list[str]:
        """Labels of the reward sources that were logged."""
        found = [match[1] for match in map(_LABEL.fullmatch, self.series) if match]
        return [label for label in found if label not in ("total", "after_kl")]

    def learned(self) -> bool:
        """Return whether some source's scores, always within [0, 1], have risen to `LEARNED`: little is then left to do."""
        means = {label: f"reward/{label}/mean" for label in self.labels}
        within = [name for name in means.values() if self.series[name].low >= 0 and self.series[name].high <= 1]
        return any(self.mean(name) >= LEARNED > self.first(name) for name in within)

    def gained(self) -> bool:
        """Return whether the mean reward has risen by a standard deviation of the first rollouts."""
        return self.mean("reward/total/mean") - self.first("reward/total/mean") >= self.first("reward/total/std")

    def watched(self) -> Iterator[tuple[str, Metric]]:
        """Yield the logged metrics with a healthy range."""
        for name in self.series:
            if name not in self._declared:
                found = (metric for form, metric in self._forms if form.fullmatch(name))
                self._declared[name] = next(found, None)
            if (metric := self._declared[name]) is not None:
                yield name, metric

    @cached_property
    def _declared(self) -> dict[str, Metric | None]:
        return {}

    @cached_property
    def _forms(self) -> list[tuple[re.Pattern[str], Metric]]:
        return [(pattern(name), metric) for name, metric in self.ranges.items()]

    def next_place(self, axis: str) -> int:
        """Return the first free place of a list of the recipe, for an override that adds to it."""
        return len(self.recipe.get(axis) or ())

    def uses(self, axis: str, name: str) -> list[int]:
        """Return the places of a plugin in a list of the recipe."""
        plugins: Sequence[Any] = self.recipe.get(axis) or ()
        return [i for i, plugin in enumerate(plugins) if isinstance(plugin, Mapping) and plugin.get("use") == name]


@dataclass(kw_only=True)
class Pattern(Plugin, ABC):
    """Find in a run's log that it goes wrong. Axis `doctor`: no recipe names its plugins, every run watches for all of them.

    `-p no:doctor.NAME` turns one off. A pattern has no settings and no state: `find` is called after each of the first 50
    entries of the log and then after every fifth, in a resumed run for the entries before it too, and a finding is shown once.
    """

    axis = Axis(section="Health", metric_prefix="doctor", watches=True)

    meaning: ClassVar[str]
    """Meaning, as one phrase."""
    symptom: ClassVar[str]
    """Symptom that a user sees, as one phrase; a heading of the page on troubleshooting."""
    rule: ClassVar[str]
    """When it is found, with its thresholds, as one phrase."""
    covers: ClassVar[frozenset[str]] = frozenset()
    """Metrics whose healthy range need not be watched besides."""

    @abstractmethod
    def find(self, history: History) -> Iterable[Finding]:
        """Yield what is wrong now, with the step since when; nothing if the log does not tell."""
