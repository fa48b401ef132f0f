"""A reward source that says the same of every completion, or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

ROLLOUTS, NONE = 10, 1e-6


@dataclass(kw_only=True)
class DeadReward(Pattern):
    """One of several sources adds nothing to the reward."""

    name = "dead_reward"
    meaning = "a reward source gives every completion the same score, or none"
    symptom = "The curve of one reward is a line"
    rule = (
        f"`reward/<label>/std` is 0 in {ROLLOUTS} rollouts in a row, or the source scores nothing in them, unless its mean has "
        "risen. Left out: sources of weight 0; penalties at 0; verifiers that give 0 (see `no_answer`); the only source where "
        "`no_spread` sees it"
    )

    def find(self, history: History) -> Iterable[Finding]:
        paid = {label: source for label, source in history.sources.items() if source.weight}
        if len(paid) == 1 and "reward/zero_std_frac" in history.series:
            return
        for label, source in paid.items():
            out = (f"rewards.{source.place}.weight=0",) if len(paid) > 1 else ()
            alone = "" if out else " There is no override to type: it is the only source that pays."
            mean, std = f"reward/{label}/mean", f"reward/{label}/std"
            if mean not in history.series:
                if len(history.values("rollout/rows", ROLLOUTS)) == ROLLOUTS:
                    text = (
                        f"The reward {label} has scored no completion so far. Check its column and `when`, or leave it "
                        f"out.{alone}"
                    )
                    yield Finding(self.name, 1, text, out, mean)
                continue
            step = history.since(std, lambda spread: spread < NONE, ROLLOUTS)
            value = history.mean(mean)
            silent = value == 0 and (source.verifier or (source.penalty and source.weight > 0))
            if step is not None and not silent and value <= history.first(mean):
                text = (
                    f"The reward {label} is {value:.3g} for every completion: it tells none from another. Check what it looks "
                    f"for, or leave it out.{alone}"
                )
                yield Finding(self.name, step, text, out, mean)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [DeadReward]
