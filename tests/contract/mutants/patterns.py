"""Patterns of the run doctor that are wrong; see `base`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf.axes import Finding, History, Pattern
from tests.contract.mutants.base import Mutant


@dataclass(kw_only=True)
class Flat(Pattern):
    """Right: the reward has not moved in ten rollouts."""

    name = "flat"
    meaning = "the reward does not move"
    symptom = "The curve of the reward is a line"
    rule = "`reward/total/mean` is the same in 10 rollouts in a row"

    def find(self, history: History) -> Iterable[Finding]:
        values = history.values("reward/total/mean", 10)
        if len(values) == 10 and len(set(values)) == 1:
            yield Finding(self.name, history.step, f"The reward is {values[-1]:g}.", ("training.learning_rate=1e-5",))


class Sentence(Flat):
    """Ends its rule with a full stop, in a table of phrases."""

    rule = "The reward is the same."


@dataclass(kw_only=True)
class Settable(Flat):
    """Has a setting, which nothing can set."""

    rollouts: int = 10
    """Rollouts to look at."""


class Hasty(Flat):
    """Judges by one step."""

    def find(self, history: History) -> Iterable[Finding]:
        if history.values("reward/total/mean", 1) == [0.0]:
            yield Finding(self.name, history.step, "The reward is 0.")


class Blind(Flat):
    """Finds that there is no reward where nothing was logged at all."""

    def find(self, history: History) -> Iterable[Finding]:
        if "reward/total/mean" not in history.series:
            yield Finding(self.name, history.step, "There is no reward.")


class Counting(Flat):
    """Counts its calls, so that a resumed run finds something else."""

    def find(self, history: History) -> Iterable[Finding]:
        self._calls = getattr(self, "_calls", 0) + 1
        yield from super().find(history) if self._calls < 4 else ()


class Foreign(Flat):
    """Gives another name, so that `-p no:doctor.NAME` of what is shown turns nothing off."""

    def find(self, history: History) -> Iterable[Finding]:
        yield from (Finding("reward", each.step, each.text) for each in super().find(history))


class Spoken(Flat):
    """Writes its override as words."""

    def find(self, history: History) -> Iterable[Finding]:
        yield from (Finding(self.name, each.step, each.text, ("a higher rate",)) for each in super().find(history))


MUTANTS = [
    Mutant(Sentence, "pattern", "without a full stop"),
    Mutant(Settable, "pattern", "nothing sets rollouts"),
    Mutant(Hasty, "first steps", "Wait for several entries"),
    Mutant(Blind, "empty log", "There is no reward"),
    Mutant(Counting, "reads", "Keep no state"),
    Mutant(Foreign, "reads", "Finding.pattern must be 'flat'"),
    Mutant(Spoken, "reads", "must be a tuple of KEY=VALUE"),
]
