"""Drops bad rows that the policy would hardly say (off-policy sequence masking, DeepSeek-V3.2, arXiv:2512.02556).

Departure: the paper measures against the policy at every update; here the policy that rolled out, in the trainer, is
compared with the sampler once per rollout, so that no split into micro-batches changes what is dropped. What is masked is
the mismatch of the sampler alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Filter, NonNegative

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class OPSM(Filter):
    """Drops rows with A < 0 and mean(log p_sampler - log p_trainer) > delta over their tokens.

    Where advantages differ between tokens, the sign is that of the row's sum. A row without sampled tokens is kept.
    """

    name = "opsm"
    needs = frozenset({"advantages", "old_logps", "sampler_logps"})

    delta: NonNegative = 0.1
    """The largest mean log-ratio of a row with negative advantage, in nats per token."""

    def __call__(self, scored: Scored) -> Tensor:
        assert scored.advantages is not None, "the core provides what `needs` names"
        assert scored.sampler_logps is not None, "the core provides what `needs` names"
        assert scored.old_logps is not None, "the core provides what `needs` names"
        mismatch = (scored.sampler_logps - scored.old_logps).masked_fill(scored.mask == 0, 0.0).sum(1)
        mean = mismatch / scored.mask.sum(1).clamp(min=1)
        return ~(((scored.advantages * scored.mask).sum(1) < 0) & (mean > self.delta))


@hookimpl
def filters() -> list[type[Filter]]:
    return [OPSM]
