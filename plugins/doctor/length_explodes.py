"""Completions that grow because the reward pays for length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

from ._advice import added

METRIC, REWARD, SPREAD = "rollout/length/mean", "reward/total/mean", "reward/total/std"
WINDOW, PART, GROWTH, GAIN = 20, 5, 2.0, 0.5


@dataclass(kw_only=True)
class LengthExplodes(Pattern):
    """The length doubles in a few rollouts while the reward rises."""

    name = "length_explodes"
    meaning = "completions grow fast and the reward rises with them: it may pay for length"
    symptom = "Completions get longer and longer, and the reward rises with them"
    rule = (
        f"`{METRIC}` has grown by {GROWTH:g} within {WINDOW} rollouts (means of {PART}) while `{REWARD}` rose by {GAIN} of the "
        "standard deviation"
    )

    def find(self, history: History) -> Iterable[Finding]:
        series = history.series.get(METRIC)
        lengths, rewards = history.values(METRIC, WINDOW), history.values(REWARD, WINDOW)
        if series is None or len(lengths) != len(rewards) or len(lengths) < 2 * PART:
            return
        means = [fmean(lengths[i : i + PART]) for i in range(len(lengths) - PART + 1)]
        start = min(range(len(means)), key=means.__getitem__)
        gain = fmean(rewards[-PART:]) - fmean(rewards[start : start + PART])
        spread = fmean(history.values(SPREAD, WINDOW)[start : start + PART])
        if means[-1] < GROWTH * means[start] or gain < GAIN * spread or gain <= 0:
            return
        step = series.last[len(series.last) - len(lengths) + start + PART - 1][0]
        text = (
            f"Completions have grown from {means[start]:.3g} to {means[-1]:.3g} tokens in {len(means) - 1 - start} rollouts, and "
            f"the reward by {gain:.2g}: it may pay for length. Look at completions, and charge for length or bound it."
        )
        yield Finding(self.name, step, text, (self._charge(history, means[start], means[-1]),), METRIC)

    def _charge(self, history: History, before: float, now: float) -> str:
        """Return an override that charges for the growth; a reward of length that pays for it gets the other sign."""
        for place in history.uses("rewards", "length"):
            weight = history.recipe["rewards"][place].get("weight", 1.0)
            return f"rewards.{place}.weight={abs(weight) * (1 if weight < 0 else 2):.3g}"
        target = max(round(before), 1)
        return added(history, "rewards", f"{{use: length, target: {target}, maximum: {max(round(now), target + 1)}}}")


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [LengthExplodes]
