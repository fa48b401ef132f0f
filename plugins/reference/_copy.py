"""A reference that follows the policy: its copy, and how the copy moves."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel


def frozen_copy(policy: PreTrainedModel) -> Any:
    """The policy as it is now, in evaluation mode, without gradients. What the policy does not train, as the weights below an
    adapter, are its very tensors."""
    memo: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
    model = deepcopy(policy, memo).eval().requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return model


def check_mixing(policy: PreTrainedModel, share: float, who: str) -> None:
    """Raises `ValueError` where the weights cannot be mixed with this share of the policy: adapters, and half precision."""
    if share == 1:
        return
    if hasattr(policy, "disable_adapter"):
        raise ValueError(
            f"{who} would mix an adapter's factors, and a mixture of factors is not the mixture of the models: set "
            "reference.use=sync with mixing=1, reference.use=frozen or adapter_off, or train without an adapter"
        )
    halves = {str(p.dtype).removeprefix("torch.") for p in policy.parameters() if p.dtype.itemsize < 4}
    if share < 0.5 and halves:
        raise ValueError(
            f"{who} in {', '.join(sorted(halves))} would stand still: less than half of a smallest step is rounded away. Set "
            "model.dtype=float32 (with training.bf16=true forwards stay in bfloat16), or let the policy's share be 0.5 or more"
        )


def mix(model: Module, policy: Module, share: float) -> None:
    """model <- share x policy + (1 - share) x model, in place; a share of 1 copies to the bit."""
    import torch

    with torch.no_grad():
        for mine, its in zip(model.parameters(), policy.parameters(), strict=True):
            if mine is its:
                continue
            if share == 1:
                mine.copy_(its)
            else:
                mine.lerp_(its.to(mine.device), share)
