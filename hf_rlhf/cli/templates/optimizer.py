"""Steps by the sign of the momentum: every weight moves by the learning rate, whatever the size of its gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Interval
from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import UpdateRule

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from transformers import TrainingArguments

hf_rlhf_api = "1.0"


class Signs(torch.optim.Optimizer):
    """weight <- weight - lr sign(average), average <- momentum x average + (1 - momentum) x gradient."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {"lr": 1e-5})
        self.momentum = momentum
        self.agree_frac: float | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        agreeing, count = 0.0, 0
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
                average = self.state[weight]["average"].lerp_(weight.grad, 1 - self.momentum)
                agreeing += float((average.sign() == weight.grad.sign()).sum())
                count += weight.numel()
                weight.sub_(average.sign(), alpha=group["lr"])
        self.agree_frac = agreeing / count if count else None


@dataclass(kw_only=True)
class MyName(UpdateRule):
    """Gradient descent by the sign of an exponential average of the gradients."""

    name = "my_name"
    metrics = (
        Metric(
            "agree_frac",
            "share of weights",
            "weights whose gradient has the sign of the average",
            (0.5, None),
            "Gradients contradict each other: raise `rollout.prompts`, or `momentum`.",
            when="step",
        ),
    )

    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Share of the average that is kept in each step."""
    learning_rate: Annotated[float, Interval(gt=0, le=0.01)] = 1e-5
    """How far a weight of the policy moves in a step: about a tenth of what AdamW gets."""

    def __post_init__(self) -> None:
        self._optimizer: Signs | None = None

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield "training.learning_rate is the critic's; the policy's is optimizer.learning_rate, under the same schedule"

    def check_arguments(self, args: TrainingArguments) -> Iterable[str]:
        if args.weight_decay:
            yield (
                f"training.weight_decay={args.weight_decay:g} would be outweighed by signs, and is not applied: set "
                "training.weight_decay=0"
            )

    def build(self, policy: torch.nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        critic = {id(weight) for group in groups for weight in group["params"]}
        own = [weight for weight in policy.parameters() if weight.requires_grad and id(weight) not in critic]
        self._optimizer = Signs([{"params": own, "lr": self.learning_rate}, *groups], self.momentum)
        return self._optimizer

    def take_logs(self) -> dict[str, float]:
        share = self._optimizer.agree_frac if self._optimizer else None
        return {} if share is None else {"agree_frac": share}


@hookimpl
def optimizer() -> list[type[UpdateRule]]:
    return [MyName]
