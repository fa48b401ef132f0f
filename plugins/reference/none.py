"""No reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class NoReference(Reference):
    """Provides no log-probs; recipes with a KL that needs them are rejected."""

    name = "none"
    provides = frozenset()

    def build(self, policy: PreTrainedModel) -> None:
        return None


@hookimpl
def reference() -> list[type[Reference]]:
    return [NoReference]
