"""Filter for bad rows that are unlikely under the policy (off-policy sequence masking, DeepSeek-V3.2, arXiv:2512.02556).

Departure: the paper compares with the current policy at every update; here the trainer's log-probs at rollout time are
compared with the sampler's once per rollout, so that no split into micro-batches changes what is dropped. Only the
sampler's mismatch is masked.
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

    If advantages differ between tokens, the sign is that of the row's sum. A row without sampled tokens is kept.
    """

    name = "opsm"
    words = "bad completions that drifted by more than {delta:g} nats per token from the sampler are dropped"
    needs = frozenset({"advantages", "old_logps", "sampler_logps"})
    across_groups = False

    delta: NonNegative = 0.1
    """Largest mean log-ratio of a row with negative advantage, in nats per token."""

    def __call__(self, scored: Scored) -> Tensor:
        assert scored.advantages is not None, "filled because `needs` names it"
        assert scored.sampler_logps is not None, "filled because `needs` names it"
        assert scored.old_logps is not None, "filled because `needs` names it"
        mismatch = (scored.sampler_logps - scored.old_logps).masked_fill(scored.mask == 0, 0.0).sum(1)
        mean = mismatch / scored.mask.sum(1).clamp(min=1)
        return ~(((scored.advantages * scored.mask).sum(1) < 0) & (mean > self.delta))


@hookimpl
def filters() -> list[type[Filter]]:
    return [OPSM]
