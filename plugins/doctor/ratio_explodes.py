"""Updates that leave the policy that wrote the rollout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

from ._advice import HIGH, LOW, apart, lower_learning_rate, one_epoch

KL, RATIO = "policy/approx_kl", "policy/ratio"
MOST = 0.1


@dataclass(kw_only=True)
class RatioExplodes(Pattern):
    """Within the steps on one rollout, the policy moves far from the one that sampled it."""

    name = "ratio_explodes"
    meaning = "the updates on one rollout move the policy too far from the one that sampled it"
    symptom = "The ratio is far from 1, most tokens are clipped, and the reward jumps up and down"
    rule = f"`{KL}` above {MOST}, or `{RATIO}` outside {LOW} to {HIGH}, in 5 rollouts in a row (mean over a rollout's steps)"
    covers = frozenset({KL, RATIO})

    def find(self, history: History) -> Iterable[Finding]:
        step = apart(history, KL, MOST, RATIO)
        if step is None:
            return
        steps = 5 * history.steps_per_rollout
        text = (
            f"The updates on one rollout move the policy by {history.mean(KL, steps):.2g} nats per token (mean ratio "
            f"{history.mean(RATIO, steps):.3g}) from the one that sampled it: most of the rollout is no longer its own. "
            "Take smaller or fewer steps per rollout."
        )
        yield Finding(self.name, step, text, (*lower_learning_rate(history), *one_epoch(history)), KL)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [RatioExplodes]
