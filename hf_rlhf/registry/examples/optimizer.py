"""Plain gradient descent with momentum.

Try it: `hf-rlhf train quickstart 'optimizer={use: momentum, learning_rate: 0.01}'`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hf_rlhf import hookimpl
from hf_rlhf.axes import Fraction, Positive, UpdateRule

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class Momentum(UpdateRule):
    """torch.optim.SGD over the policy; `groups` are the critic's parameters, if there is one."""

    name = "momentum"

    learning_rate: Positive = 1e-3
    """Learning rate of the policy; it follows the schedule of TrainingArguments."""
    momentum: Fraction = 0.9
    """Share of the last step that is kept."""

    def build(self, policy: torch.nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        critic = {id(weight) for group in groups for weight in group["params"]}
        own = [weight for weight in policy.parameters() if weight.requires_grad and id(weight) not in critic]
        return torch.optim.SGD([{"params": own, "lr": self.learning_rate}, *groups], momentum=self.momentum)


@hookimpl
def optimizer() -> list[type[UpdateRule]]:
    return [Momentum]
