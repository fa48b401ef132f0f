"""The policy as it was when training began; what it does not train is held once."""

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
    """A copy of the policy that never learns, adapters included."""

    name = "frozen"

    offload: bool = False
    """Keep it away from the device but for the forwards that read it: in main memory. The
    trained parameters are the same bits."""

    def build(self, policy: PreTrainedModel) -> Module:
        return frozen_copy(policy)


@hookimpl
def reference() -> list[type[Reference]]:
    return [Frozen]
