"""A policy that leaves the reference model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

from ._advice import dearer_kl

METRIC, LENGTH = "kl/ref", "rollout/length/mean"
PER_ROW, LITTLE, PER_TOKEN = 30.0, 0.05, 3.0


@dataclass(kw_only=True)
class KLExplodes(Pattern):
    """The KL to the reference is large by row and by token."""

    name = "kl_explodes"
    meaning = "the policy has left the reference model"
    symptom = "The KL grows without end, and completions turn into nonsense"
    rule = (
        f"`{METRIC}` above {PER_ROW:g} nats per row, and {LITTLE} nats per token of the mean length, or above {PER_TOKEN:g} "
        "nats per token alone, in 5 rollouts in a row"
    )
    covers = frozenset({METRIC, "kl/rollout/sequence"})

    def find(self, history: History) -> Iterable[Finding]:
        length = max(history.mean(LENGTH), 1.0) if LENGTH in history.series else 1.0
        limit = min(max(PER_ROW, LITTLE * length), PER_TOKEN * length)
        step = history.since(METRIC, lambda kl: kl > limit)
        if step is not None:
            kl = history.mean(METRIC)
            text = (
                f"The KL to the reference is {kl:.3g} nats per completion, {kl / length:.2g} per token: the policy has left "
                "the reference model. Make the KL dearer or the steps smaller."
            )
            yield Finding(self.name, step, text, dearer_kl(history), METRIC)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [KLExplodes]
