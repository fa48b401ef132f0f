"""The optimizer selected by TrainingArguments (`training.optim`, AdamW by default)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import UpdateRule

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(kw_only=True)
class TrainersOwn(UpdateRule):
    """Leaves the optimizer to transformers.Trainer."""

    name = "trainer"

    def build(self, policy: Module, groups: list[dict[str, Any]]) -> None:
        return None


@hookimpl
def optimizer() -> list[type[UpdateRule]]:
    return [TrainersOwn]
