"""Evaluations of several models in one table, with paired differences on the prompts that they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from hf_rlhf.config.recipe import Recipe
from hf_rlhf.metrics.console import number
from hf_rlhf.runtime.versions import versions
from hf_rlhf.training.evaluation import Evaluated, is_share
from hf_rlhf.training.intervals import paired_interval
from hf_rlhf.training.model_evaluation import Subject, prompt_keys

Interval = tuple[float, float, float]
"""A number, and the ends of its 95 % interval."""


@dataclass(kw_only=True)
class Comparison:
    """Evaluated models; the first is what the others are compared with."""

    recipe: Recipe
    found: list[tuple[Subject, Evaluated]] = field(default_factory=list)

    def add(self, subject: Subject, evaluated: Evaluated) -> None:
        """Add a model's evaluation."""
        self.found.append((subject, evaluated))

    @property
    def failed(self) -> int:
        """Number of rows whose scoring failed, over all models and sources."""
        return sum(int(x) for _, e in self.found for name, x in e.metrics.items() if name.startswith("health/"))

    @property
    def title(self) -> str:
        """Say what was asked."""
        count, group = len(self.found[0][0].prompts), self.recipe.evaluation.num_generations
        each = "one completion each" if group == 1 else f"{group} completions each"
        return f"{count} prompts, {each}, by the recipe {self.recipe.name}; in brackets 95 % intervals over the prompts"

    def difference(self, subject: Subject, evaluated: Evaluated) -> tuple[int, dict[str, Interval]]:
        """Return the number of prompts that a model shares with the first, and by metric how much more it has there."""
        first, base = self.found[0]
        places = {key: i for i, key in enumerate(prompt_keys(first.prompts))}
        pairs = [(places[key], i) for i, key in enumerate(prompt_keys(subject.prompts)) if key in places]
        before, after = ([pair[side] for pair in pairs] for side in (0, 1))
        made = {}
        for name in evaluated.metrics:
            if name in base.names and not name.startswith("health/"):
                sums = (base.column(name)[before], evaluated.column(name)[after])
                if (interval := paired_interval(*sums, is_share(name))) is not None:
                    made[name] = interval
        return len(pairs), made

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return head and rows: a metric with its interval by model, then the differences from the first."""
        others = [(subject.label, self.difference(subject, e)[1]) for subject, e in islice(self.found, 1, None)]
        first = self.found[0][0].label
        head = ["", *(subject.label for subject, _ in self.found), *(f"{label} - {first}" for label, _ in others)]
        named = dict.fromkeys(name for _, e in self.found for name, x in e.metrics.items() if self._is_shown(name, x))
        rows = []
        for name in sorted(named, key=lambda name: "/" in name):  # accuracy, pass@k and maj@k first
            own = [_cell(e.metrics.get(name), e.intervals.get(name)) for _, e in self.found]
            rows.append([name, *own, *(_signed(made.get(name)) for _, made in others)])
        return head, rows

    @staticmethod
    def _is_shown(name: str, x: float) -> bool:
        return x != 0 or not name.startswith("health/")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "recipe": self.recipe.name,
            "dataset": {key: self.recipe.raw["dataset"][key] for key in ("path", "eval_path", "eval_split")},
            "num_generations": self.recipe.evaluation.num_generations,
            "seed": self.recipe.training_arguments().seed,
            "models": [
                {
                    "model": subject.word,
                    "label": subject.label,
                    "prompts": len(subject.prompts),
                    "metrics": e.metrics,
                    "intervals": e.intervals,
                }
                for subject, e in self.found
            ],
            "differences": [
                {
                    "model": subject.label,
                    "from": self.found[0][0].label,
                    "prompts": count,
                    "metrics": {name: x for name, (x, _, _) in made.items()},
                    "intervals": {name: ends for name, (_, *ends) in made.items()},
                }
                for subject, e in islice(self.found, 1, None)
                for count, made in [self.difference(subject, e)]
            ],
            "versions": versions(),
        }


def _cell(x: float | None, interval: tuple[float, float] | None) -> str:
    text = number(x)
    return text if interval is None else f"{text} ({number(interval[0])} to {number(interval[1])})"


def _signed(found: Interval | None) -> str:
    if found is None:
        return "-"
    x, low, high = (f"{'+' if value > 0 else ''}{number(value)}" for value in found)
    return f"{x} ({low} to {high})"
