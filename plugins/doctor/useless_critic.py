"""A critic that predicts returns worse than a constant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

METRIC = "value/explained_var"
ROLLOUTS, WILD = 15, -1.0


@dataclass(kw_only=True)
class UselessCritic(Pattern):
    """The critic's errors are larger than the returns' own variance."""

    name = "useless_critic"
    meaning = "the critic explains nothing: a constant would predict the returns better"
    symptom = "The value loss does not fall, and PPO learns more slowly than it would without a critic"
    rule = f"`{METRIC}` below 0 in {ROLLOUTS} rollouts in a row, unless the task is learned: returns then hardly vary"
    covers = frozenset({METRIC})

    def find(self, history: History) -> Iterable[Finding]:
        step = history.since(METRIC, lambda share: share < 0, ROLLOUTS)
        if step is None or history.learned():
            return
        critic, share = history.recipe.get("critic") or {}, history.mean(METRIC, ROLLOUTS)
        rate = critic.get("learning_rate") or history.learning_rate
        wild = share < WILD
        text = (
            f"The critic explains {share:.2g} of the returns' variance (1 is perfect, below 0 is worse than a constant), so its "
            f"advantages add noise. Let it learn {'more slowly' if wild else 'faster'}, and alone at the start."
        )
        paced = (f"critic.learning_rate={rate * (0.1 if wild else 10):.1e}",) if rate else ()
        warmup = f"critic.warmup_steps={max(2 * critic.get('warmup_steps', 0), 10 * history.steps_per_rollout)}"
        yield Finding(self.name, step, text, (*paced, warmup), METRIC)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [UselessCritic]
