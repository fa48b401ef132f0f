"""A metric that stays outside of the healthy range that it is declared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Finding, History, Pattern

from ._advice import learning_rate, lower_learning_rate

ENTRIES, EVALUATIONS = 5, 2


@dataclass(kw_only=True)
class OutOfRange(Pattern):
    """A declared metric, of the core or of a plugin, is unhealthy; those that another pattern covers are left to it."""

    name = "out_of_range"
    meaning = "a metric stays outside of its healthy range"
    symptom = "A curve leaves its healthy band"
    rule = (
        f"outside of the range that the metric declares in {ENTRIES} rollouts in a row, or {EVALUATIONS} evaluations of which "
        "one is after the start; metrics that another pattern covers are left to it"
    )

    def find(self, history: History) -> Iterable[Finding]:
        for name, metric in history.watched():
            low, high = metric.healthy or (None, None)
            evaluated = metric.when == "evaluation"

            def wrong(x: float, low: float | None = low, high: float | None = high) -> bool:
                return (low is not None and x < low) or (high is not None and x > high)

            step = history.since(name, wrong, EVALUATIONS if evaluated else ENTRIES)
            if step is None or (evaluated and history.step == 0):
                continue
            now = history.mean(name, EVALUATIONS if evaluated else ENTRIES)
            side, bound = ("below", low) if low is not None and now < low else ("above", high)
            unit = f" {metric.unit}" if metric.unit else ""
            text = f"{name} ({metric.meaning}) is {now:.3g}{unit}, {side} {bound:g}. {metric.unhealthy}"
            overrides = self._overrides(history, metric)
            if not overrides:
                text += " There is no override to type: what helps depends on the cause."
            yield Finding(self.name, step, text, overrides, name)

    def _overrides(self, history: History, metric: Metric) -> tuple[str, ...]:
        """Return the change of the learning rate that the metric's own advice names."""
        words = metric.unhealthy.lower()
        if "lower the learning rate" in words:
            return lower_learning_rate(history)
        return learning_rate(history, 3.0) if "raise the learning rate" in words else ()


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [OutOfRange]
