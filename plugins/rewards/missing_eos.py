"""Penalty on completions truncated at the maximum length, before an end-of-sequence token.

Its `weight` is the `missing_eos_penalty` of TRL and of "The N implementation details of RLHF with PPO" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts


@dataclass(kw_only=True)
class MissingEos(RewardSource):
    """-1 if a completion was truncated, 0 if it ended by itself."""

    name = "missing_eos"
    rowwise: ClassVar[bool] = True
    penalty: ClassVar[bool] = True

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [-1.0 if reason == "length" else 0.0 for reason in rollouts.finish_reasons]


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [MissingEos]
