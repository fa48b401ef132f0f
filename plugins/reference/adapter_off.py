"""The policy's base model, with its adapter disabled: a reference without memory cost.

The reference is the base model, so a policy that starts from a trained adapter does not start at KL 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from hf_rlhf import hookimpl
from hf_rlhf.axes import Reference

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class AdapterOff(Reference):
    """Log-probs of the policy without its adapter (LoRA and others from peft)."""

    name = "adapter_off"
    words = "the model without its adapter"
    needs = frozenset({"adapter"})

    def build(self, policy: PreTrainedModel) -> None:
        if not hasattr(policy, "disable_adapter"):
            raise TypeError(
                f"reference.adapter_off needs a policy with an adapter, but this {type(policy).__name__} has none. "
                "Give it one (model.lora in a recipe, peft_config in Python) or set reference.use=frozen"
            )

    def active(self, policy: PreTrainedModel) -> AbstractContextManager[None]:
        return cast("PeftModel", policy).disable_adapter()


@hookimpl
def reference() -> list[type[Reference]]:
    return [AdapterOff]
