"""Moving average of the policy as reference (the anchor of WARP, arXiv:2406.16768, whose mu is 1 - decay)."""

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
    """reference <- decay x reference + (1 - decay) x policy for each weight, after every optimizer step."""

    name = "ema"
    words = "a moving average of the policy (decay {decay:g})"
    moves = True

    decay: Fraction = 0.99
    """Share of the reference kept in each step; 0 copies the policy, 1 is rejected because nothing would change."""
    offload: bool = False
    """Keep it in main memory except for the forwards that read it; it is updated in main memory."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.decay == 1:
            yield "decay must be below 1, got 1: the reference would never change. Lower it, or set reference.use=frozen"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.decay == 0:
            yield "the reference is the policy's copy at every rollout, so the KL of sampled tokens is 0"

    def build(self, policy: PreTrainedModel) -> Module:
        check_mixing(policy, 1 - self.decay, f"reference.ema with decay={self.decay:g}")
        return frozen_copy(policy)

    def move(self, model: Module, policy: PreTrainedModel, step: int) -> None:
        mix(model, policy, 1 - self.decay)


@hookimpl
def reference() -> list[type[Reference]]:
    return [EMA]
