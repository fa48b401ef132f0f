"""No spread of rewards within most groups, so that group-relative advantages are 0."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

MOST = 0.8
METRIC = "reward/zero_std_frac"


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
        if step is None or history.learned():
            return
        share, reward = history.mean(METRIC), history.mean("reward/total/mean")
        text = (
            f"{share:.0%} of the completions are in groups whose rewards are all equal (mean reward {reward:.3g}): no signal "
            "between them. Choose prompts near the policy's ability, sample more per prompt, or replace such groups."
        )
        settings = history.recipe.get("rollout") or {}
        overrides = [f"rollout.num_generations={2 * settings.get('num_generations', 8)}"]
        if not history.uses("filters", "zero_variance"):
            overrides.append(f"filters.{history.next_place('filters')}={{use: zero_variance, resample: 4}}")
        yield Finding(self.name, step, text, tuple(overrides), METRIC)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [NoSpread]
