"""A reference that is the policy's moving average (the anchor of WARP, arXiv:2406.16768, whose mu is 1 - decay)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Fraction, Reference

from ._copy import check_mixing, frozen_copy, mix

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class EMA(Reference):
    """After every optimizer step: reference <- decay x reference + (1 - decay) x policy, weight by weight."""

    name = "ema"
    moves = True

    decay: Fraction = 0.99
    """What stays of the reference in each step; 0 copies the policy, 1 is refused, as nothing would move."""
    offload: bool = False
    """Keep it away from the device but for the forwards that read it: in main memory. It moves where it
    lies."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.decay == 1:
            yield "decay is 1, so the reference never moves: set decay to less, or reference.use=frozen"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.decay == 0:
            yield "it copies the policy before every rollout: the KL of the tokens that are rolled out is 0"

    def build(self, policy: PreTrainedModel) -> Module:
        check_mixing(policy, 1 - self.decay, f"reference.ema with decay={self.decay:g}")
        return frozen_copy(policy)

    def move(self, model: Module, policy: PreTrainedModel, step: int) -> None:
        mix(model, policy, 1 - self.decay)


@hookimpl
def reference() -> list[type[Reference]]:
    return [EMA]
