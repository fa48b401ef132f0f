"""A reference that is copied from the policy ever more rarely: after 1, 2, 4, 8, ... times `first` optimizer steps."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Count, Reference

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from transformers import PreTrainedModel

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(Reference):
    """The policy as it was at the last of the steps `first`, 2 x `first`, 4 x `first`, ..."""

    name = "my_name"
    moves = True
    metrics = (Metric("age", "optimizer steps", "steps since the policy was copied"),)

    first: Count = 16
    """Optimizer steps before the first copy; each further one comes after twice as many."""

    def __post_init__(self) -> None:
        self._age = 0

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        steps = algorithm.steps_per_rollout
        if self.first % steps:
            yield (
                f"first={self.first} copies the policy within the {steps} steps of a rollout, which shows at the next "
                f"one only: set reference.first to a multiple of {steps}"
            )

    def build(self, policy: PreTrainedModel) -> torch.nn.Module:
        return copy.deepcopy(policy).eval().requires_grad_(False)

    @torch.no_grad()
    def move(self, model: torch.nn.Module, policy: PreTrainedModel, step: int) -> None:
        self._age += 1
        turn, rest = divmod(step, self.first)
        if rest == 0 and turn & (turn - 1) == 0:  # a power of two
            self._age = 0
            for own, new in zip(model.parameters(), policy.parameters(), strict=True):
                own.copy_(new)

    def report(self) -> Mapping[str, float]:
        return {"age": float(self._age)}

    def state_dict(self) -> dict[str, Any]:
        return {"age": self._age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._age = state["age"]


@hookimpl
def reference() -> list[type[Reference]]:
    return [MyName]
