"""Two reward sources that pay for opposite completions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

NAME = re.compile(r"reward/([^/]+)/corr/([^/]+)")
MOST = -0.5


@dataclass(kw_only=True)
class RewardsAtWar(Pattern):
    """Completions that please one source displease another."""

    name = "rewards_at_war"
    meaning = "two reward sources pay for opposite completions"
    symptom = "One reward rises and another falls, and the total stays where it is"
    rule = f"`reward/<label>/corr/<other>` below {MOST} in 5 rollouts in a row"

    def find(self, history: History) -> Iterable[Finding]:
        for name in [name for name in history.series if "/corr/" in name]:
            match = NAME.fullmatch(name)
            step = history.since(name, lambda correlation: correlation < MOST) if match else None
            if match is None or step is None:
                continue
            text = (
                f"The rewards {match[1]} and {match[2]} pull apart: over completions, their correlation is "
                f"{history.mean(name):.2f}. What one pays for costs with the other; lower the weight of one, or drop it."
            )
            both = [history.sources[x] for x in match.groups() if x in history.sources]
            weaker = sorted(both, key=lambda x: abs(x.weight))[:1]
            overrides = tuple(f"rewards.{x.place}.weight={x.weight / 4:.3g}" for x in weaker)
            if not overrides:
                text += " There is no override to type: the recipe is not known."
            yield Finding(self.name, step, text, overrides, name)


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [RewardsAtWar]
