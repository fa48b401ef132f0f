"""No spread of rewards within most groups, so that group-relative advantages are 0."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

from ._advice import added

METRIC = "reward/zero_std_frac"
MOST = 0.8


@dataclass(kw_only=True)
class NoSpread(Pattern):
    """Most completions score the same as all others of their prompt, and the task is not learned."""

    name = "no_spread"
    meaning = "the completions of most prompts all score the same: nothing tells better from worse"
    symptom = "The reward is flat, and the loss and the gradient are 0 or nearly"
    rule = f"`{METRIC}` above {MOST} in 5 rollouts in a row, unless the task is learned"
    covers = frozenset({METRIC})

    def find(self, history: History) -> Iterable[Finding]:
        step = history.since(METRIC, lambda share: share > MOST)
        rewards = history.recipe.get("rewards") or []
        only_measure = rewards and not any(reward.get("weight", 1) for reward in rewards)
        if step is None or history.learned() or only_measure:
            return
        text = (
            f"{history.mean(METRIC):.0%} of the completions are in groups whose rewards are all equal (mean reward "
            f"{history.mean('reward/total/mean'):.3g}), so nothing tells better from worse. Choose prompts near the "
            "policy's ability, sample more completions per prompt, or replace groups without spread."
        )
        rollout = history.recipe.get("rollout") or {}
        overrides = [f"rollout.num_generations={2 * rollout.get('num_generations', 8)}"]
        if not history.uses("filters", "zero_variance"):
            overrides.append(added(history, "filters", "{use: zero_variance, resample: 4}"))
        yield Finding(self.name, step, text, tuple(overrides), METRIC)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [NoSpread]
