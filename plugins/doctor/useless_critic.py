"""A critic that predicts returns worse than a constant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

METRIC = "value/explained_var"
ROLLOUTS = 10


@dataclass(kw_only=True)
class UselessCritic(Pattern):
    """The critic's errors are larger than the returns' own variance."""

    name = "useless_critic"
    meaning = "the critic explains nothing: a constant would predict the returns better"
    symptom = "The value loss does not fall, and PPO learns more slowly than it would without a critic"
    rule = f"`{METRIC}` below 0 in {ROLLOUTS} rollouts in a row"
    covers = frozenset({METRIC})

    def find(self, history: History) -> Iterable[Finding]:
        step = history.since(METRIC, lambda share: share < 0, ROLLOUTS)
        if step is None:
            return
        critic = history.recipe.get("critic") or {}
        rate = critic.get("learning_rate") or history.learning_rate
        text = (
            f"The critic explains {history.mean(METRIC):.2g} of the returns' variance (1 is perfect, below 0 is worse than a "
            "constant): its advantages add noise. Let it learn faster, and alone at the start."
        )
        warmup = f"critic.warmup_steps={max(2 * critic.get('warmup_steps', 0), 10 * history.steps_per_rollout)}"
        faster = (f"critic.learning_rate={10 * rate:.1e}",) if rate else ()
        yield Finding(self.name, step, text, (*faster, warmup), METRIC)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [UselessCritic]
