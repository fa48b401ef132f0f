"""1 where the whole completion has a given form, else 0, as for the tags of DeepSeek-R1 (arXiv:2501.12948)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts


@dataclass(kw_only=True)
class Format(RewardSource):
    """1.0 where the regular expression matches the completion from its first to its last character, 0.0 elsewhere."""

    name = "format"

    pattern: str = r"<think>.*</think>\s*<answer>.*</answer>"
    """A regular expression of Python; `.` matches line breaks too. End it with `.*` to allow any rest."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from error

    def __call__(self, rollouts: Rollouts) -> list[float]:
        pattern = re.compile(self.pattern, re.DOTALL)
        return [float(pattern.fullmatch(completion) is not None) for completion in rollouts.completions]


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Format]
