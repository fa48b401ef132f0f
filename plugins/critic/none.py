"""No critic: returns are not predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Critic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class NoCritic(Critic):
    """Provides no values; recipes whose estimator needs them are rejected."""

    name = "none"

    def build(self, policy: PreTrainedModel, algorithm: Algorithm) -> None:
        return None


@hookimpl
def critic() -> list[type[Critic]]:
    return [NoCritic]
