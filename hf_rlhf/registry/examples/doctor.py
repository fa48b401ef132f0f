"""Completions that are all of one length: the policy may repeat one text.

Try it: `hf-rlhf train quickstart rollout.max_new_tokens=2`
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class OneLength(Pattern):
    """The longest completion of a rollout is as short as the shortest one."""

    name = "one_length"
    meaning = "all completions have the same length"
    symptom = "Every completion is as long as any other"
    rule = "`rollout/length/min` equals `rollout/length/max` in the last 5 rollouts"

    def find(self, history: History) -> Iterable[Finding]:
        shortest = history.values("rollout/length/min", 5)
        longest = history.values("rollout/length/max", 5)
        if len(shortest) == 5 and shortest == longest:
            text = f"All completions have {longest[-1]:g} tokens."
            yield Finding(self.name, history.step, text, ("rollout.temperature=1.2",), "rollout/length/max")


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [OneLength]
