"""Base class of the axis `optimizer`: how an optimizer step is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf.contract import outputs
from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Plugin

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from hf_rlhf.contract.optimizer_step import Step


@dataclass(kw_only=True)
class UpdateRule(Plugin, ABC):
    """Build the optimizer. Axis `optimizer`."""

    axis = Axis(section="Optimizer", metric_prefix="optimizer", default="trainer", outputs=outputs.OPTIMIZER)

    @abstractmethod
    def build(self, policy: torch.nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        """Return an optimizer of the policy and the critic's `groups`, or None for the one in TrainingArguments."""

    def check_arguments(self, args: TrainingArguments) -> Iterable[str]:
        """Yield reasons why this rule cannot run with these TrainingArguments, each with what to write instead."""
        return ()

    def hold(self, step: Step) -> None:
        """Take the micro-batches and the loss of a step, between the backward and the optimizer's `step()`."""

    def take_logs(self) -> dict[str, float]:
        """Return metrics of the last optimizer step, equal on every process; logged under `optimizer/`."""
        return {}
