"""The head of TRL's trainers where it has an adapter, or is in float64: from all logits, by the model's own forward.

TRL multiplies hidden states by `lm_head.weight` in float32, which an adapter on the head is no part of, and refuses it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from hf_rlhf.axes import at_least_float32

UNSCORED = -100
"""Label of tokens that are not scored."""


class Whole:
    """Wrapper of a model with the call that TRL makes to fuse the head."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Any:
        """Return what TRL reads from a forward, from all logits at once."""
        outputs = self.model(**inputs)
        logits, given = at_least_float32(outputs.logits[:, :-1]), labels[:, 1:]
        off = given == UNSCORED
        each = logits.log_softmax(-1)
        return SimpleNamespace(
            log_probs=each.gather(-1, given.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(off, 0.0),
            entropy=-(each.exp() * each).sum(-1).detach().masked_fill(off, 0.0),
            mean_logits=logits.detach().mean(-1),
            is_top1=logits.argmax(-1) == given,
            label_mask=~off,
            aux_loss=getattr(outputs, "aux_loss", None),
        )


class AdaptedHead:
    """Mixin in front of a trainer of TRL: an adapter on the head is accepted, and `called` computes with it."""

    model: Any

    def __init__(self, *args: Any, model: Any, **kwargs: Any):
        if adapted := has_adapted_head(model):
            model.get_output_embeddings = lambda: None  # for TRL's check, which would refuse it
        try:
            super().__init__(*args, model=model, **kwargs)  # type: ignore[call-arg]
        finally:
            if adapted:
                del model.get_output_embeddings

    def called(self, model: Any) -> Any:
        """Return the model as TRL should call it."""
        return Whole(model) if has_adapted_head(self.model) else model


def has_adapted_head(model: Any) -> bool:
    """Return whether the head's logits are more than a product with `lm_head.weight`."""
    head = model.get_output_embeddings() if hasattr(model, "peft_config") else None
    return hasattr(head, "base_layer") or hasattr(head, "token_adapter")
