"""The optimizer step as update rules see it that compute the loss again, such as TRPO's line search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_rlhf.contract.optimizer_step import Step
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.modeling.policy import distributions


def step_of(trainer: Any, micro_batches: list[dict[str, Any]]) -> Step:
    """Return the step for update rules that compute the loss again; nothing of that is logged."""
    rollout = [micro for micro in micro_batches if "text_term" not in micro]
    module, accelerator = trainer.actor_critic, trainer.accelerator

    def prepared(micro: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = trainer._prepare_inputs(micro)
        return found

    def loss(micro: dict[str, Any]) -> Tensor:
        with trainer.compute_loss_context_manager():
            terms = trainer._terms(module, prepared(micro), MetricAggregator(), with_critic=False)
            return sum(terms.values(), start=torch.zeros(()))

    def log_probs(micro: dict[str, Any]) -> Tensor:
        with accelerator.autocast():
            return distributions(module.policy, micro["batch"], module.temperature)

    return Step(
        micro_batches=rollout,
        loss=loss,
        log_probs=log_probs,
        total=lambda x: accelerator.reduce(x.detach(), "sum") if trainer.args.world_size > 1 else x.detach(),
    )
