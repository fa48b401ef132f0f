"""A policy that has stopped exploring before it has learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

from ._advice import added, lower_learning_rate

METRIC = "policy/entropy"
LEAST = 0.02


@dataclass(kw_only=True)
class EntropyCollapse(Pattern):
    """The entropy is near 0, and the reward has gained little."""

    name = "entropy_collapse"
    meaning = "the policy writes one thing and explores no more"
    symptom = "All completions of a prompt are alike, and the reward stops rising early"
    rule = (
        f"`{METRIC}` below {LEAST} in 5 rollouts in a row, unless the task is learned or the mean reward has risen by a "
        "standard deviation of the first rollouts"
    )
    covers = frozenset({METRIC})

    def find(self, history: History) -> Iterable[Finding]:
        step = history.since(METRIC, lambda entropy: entropy < LEAST)
        if step is None or history.learned() or history.gained():
            return
        text = (
            f"The entropy is {history.mean(METRIC):.2g} nats per token (at the start {history.first(METRIC):.2g}): the policy "
            "writes one thing and explores no more. Reward entropy, or take smaller steps."
        )
        terms = history.uses("loss_terms", "entropy")
        bonus = [f"loss_terms.{i}.coef={3 * history.recipe['loss_terms'][i]['coef']:.3g}" for i in terms]
        overrides = bonus or [added(history, "loss_terms", "{use: entropy, coef: 0.01}")]
        yield Finding(self.name, step, text, (*overrides, *lower_learning_rate(history)), METRIC)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [EntropyCollapse]
