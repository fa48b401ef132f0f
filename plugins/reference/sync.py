"""Reference that is updated from the policy every few optimizer steps (TR-DPO, arXiv:2404.09656).

TRL's sync_ref_model: `every` is its ref_model_sync_steps, `mixing` its ref_model_mixup_alpha (0.6 there). DeepSeek-R1-Zero
(arXiv:2501.12948) copied the policy every 400 steps, which is `every: 400, mixing: 1`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Fraction, Reference

from ._copy import check_mixing, frozen_copy, mix

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class Sync(Reference):
    """reference <- mixing x policy + (1 - mixing) x reference for each weight, after every `every` optimizer steps."""

    name = "sync"
    moves = True

    every: Count = 512
    """Optimizer steps between updates. Reference log-probs are computed with each rollout, so an update in between takes
    effect at the next."""
    mixing: Fraction = 1.0
    """The policy's share; 1 copies it, 0 is rejected because nothing would change."""
    offload: bool = False
    """Keep it in main memory except for the forwards that read it; it is updated in main memory."""

    def in_words(self) -> str:
        how = "replaced by the policy" if self.mixing == 1 else f"mixed with {self.mixing:g} of the policy"
        return f"a copy {how} every {self.every} steps"

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.mixing == 0:
            yield "mixing must be above 0, got 0: the reference would never change. Raise it, or set reference.use=frozen"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.mixing == 1 and algorithm.steps_per_rollout % self.every == 0:
            yield "the reference is the policy's copy at every rollout, so the KL of sampled tokens is 0"

    def build(self, policy: PreTrainedModel) -> Module:
        check_mixing(policy, self.mixing, f"reference.sync with mixing={self.mixing:g}")
        return frozen_copy(policy)

    def move(self, model: Module, policy: PreTrainedModel, step: int) -> None:
        if step % self.every == 0:
            mix(model, policy, self.mixing)


@hookimpl
def reference() -> list[type[Reference]]:
    return [Sync]
