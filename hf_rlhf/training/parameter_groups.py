"""Parameter groups of the critic, and the check of an optimizer passed in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import Critic, TrainedCritic

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments


def critic_groups(
    module: nn.Module | None, critic: Critic, args: TrainingArguments, decayed_names: Callable[[Any], list[str]]
) -> list[dict[str, Any]]:
    """Return the critic's parameter groups at its own learning rate, with and without weight decay."""
    if module is None or not isinstance(critic, TrainedCritic):
        return []
    decayed = set(decayed_names(module))
    rate = critic.learning_rate or args.learning_rate
    named = list(module.named_parameters())
    return [
        {"params": [p for n, p in named if (n in decayed) == decay], "lr": rate, "weight_decay": weight_decay}
        for decay, weight_decay in ((True, args.weight_decay), (False, 0.0))
        if any((n in decayed) == decay for n, _ in named)
    ]


def check_given(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Raise `ValueError` if an optimizer passed in Python does not hold the critic's parameters."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in held for group in groups for p in group["params"]):
        raise ValueError(
            "optimizers: the optimizer must hold the critic's parameters, else the critic never learns. Leave optimizers out, "
            "or set critic.use=none"
        )
