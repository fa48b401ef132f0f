"""A reference that catches up with the policy every so many optimizer steps (TR-DPO, arXiv:2404.09656).

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
    """After every n-th optimizer step: reference <- mixing x policy + (1 - mixing) x reference, weight by weight."""

    name = "sync"
    moves = True

    every: Count = 512
    """Optimizer steps between two moves. The reference's log-probs are taken with each rollout, so a move in between shows
    at the next."""
    mixing: Fraction = 1.0
    """The policy's share; 1 copies it, 0 is refused, as nothing would move."""
    offload: bool = False
    """Keep it away from the device but for the forwards that read it: in main memory. It moves where it
    lies."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.mixing == 0:
            yield "mixing is 0, so the reference never moves: set mixing to more, or reference.use=frozen"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.mixing == 1 and algorithm.steps_per_rollout % self.every == 0:
            yield "it copies the policy before every rollout: the KL of the tokens that are rolled out is 0"

    def build(self, policy: PreTrainedModel) -> Module:
        check_mixing(policy, self.mixing, f"reference.sync with mixing={self.mixing:g}")
        return frozen_copy(policy)

    def move(self, model: Module, policy: PreTrainedModel, step: int) -> None:
        if step % self.every == 0:
            mix(model, policy, self.mixing)


@hookimpl
def reference() -> list[type[Reference]]:
    return [Sync]
