"""No reference model: nothing is measured against one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class NoReference(Reference):
    """Gives no log-probs; refused where a KL needs them."""

    name = "none"
    provides = frozenset()

    def build(self, policy: PreTrainedModel) -> None:
        return None


@hookimpl
def reference() -> list[type[Reference]]:
    return [NoReference]
