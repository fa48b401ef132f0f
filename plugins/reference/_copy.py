"""Copies of the policy as references, and updates that move them towards the policy."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel


def frozen_copy(policy: PreTrainedModel) -> Any:
    """Copy the policy in evaluation mode, without gradients, sharing the tensors that the policy does not train."""
    memo: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
    model = deepcopy(policy, memo).eval().requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return model


def check_mixing(policy: PreTrainedModel, share: float, who: str) -> None:
    """Check that the weights can be mixed with this share of the policy. Raises `ValueError` for adapters and fp16/bf16."""
    if share == 1:
        return
    if hasattr(policy, "disable_adapter"):
        raise ValueError(
            f"{who} cannot mix adapters: a mixture of LoRA factors is not the mixture of the models. Set "
            "reference.use=sync with reference.mixing=1, reference.use=frozen or adapter_off, or train without an adapter"
        )
    halves = {str(p.dtype).removeprefix("torch.") for p in policy.parameters() if p.dtype.itemsize < 4}
    if share < 0.5 and halves:
        raise ValueError(
            f"{who} in {', '.join(sorted(halves))} would never change: small updates are rounded away. Set "
            "model.dtype=float32 (with training.bf16=true forwards stay in bfloat16), or a policy share of at least 0.5"
        )


def mix(model: Module, policy: Module, share: float) -> None:
    """Set model <- share x policy + (1 - share) x model in place; a share of 1 copies exactly."""
    import torch

    with torch.no_grad():
        for mine, its in zip(model.parameters(), policy.parameters(), strict=True):
            if mine is its:
                continue
            if share == 1:
                mine.copy_(its)
            else:
                mine.lerp_(its.to(mine.device), share)
