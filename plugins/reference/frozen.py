"""The policy at the start of training; weights that it does not train are shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Reference

from ._copy import frozen_copy

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class Frozen(Reference):
    """Log-probs of a copy of the policy that is never updated, adapters included."""

    name = "frozen"
    words = "a frozen copy"

    offload: bool = False
    """Keep it in main memory except for the forwards that read it. The trained parameters are bit-identical."""

    def build(self, policy: PreTrainedModel) -> Module:
        return frozen_copy(policy)


@hookimpl
def reference() -> list[type[Reference]]:
    return [Frozen]
