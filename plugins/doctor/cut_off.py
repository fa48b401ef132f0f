"""Completions that are cut off at the maximum length before they end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

METRIC = "rollout/truncated_frac"
MANY, ALL = 0.2, 0.95


@dataclass(kw_only=True)
class CutOff(Pattern):
    """Many completions reach the maximum length."""

    name = "cut_off"
    meaning = "completions are cut off before they end"
    symptom = "All completions have the maximum length, and answers are missing"
    rule = f"`{METRIC}` above {MANY} in 5 rollouts in a row"
    covers = frozenset({METRIC})

    def find(self, history: History) -> Iterable[Finding]:
        step = history.since(METRIC, lambda share: share > MANY)
        if step is None:
            return
        share, limit = history.mean(METRIC), (history.recipe.get("rollout") or {}).get("max_new_tokens")
        text = f"{share:.0%} of the completions are cut off at {limit or 'the maximum number of'} tokens. Allow longer ones."
        if share > ALL:
            text += (
                " Where even long ones do not end, the policy does not write its end-of-sequence token: check the chat "
                "template, or train it on demonstrations first."
            )
        if not limit:
            text += " There is no override to type: the recipe has no `rollout.max_new_tokens`."
        yield Finding(self.name, step, text, (f"rollout.max_new_tokens={2 * limit}",) if limit else (), METRIC)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [CutOff]
