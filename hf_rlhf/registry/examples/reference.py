"""A reference that is copied from the policy ever more rarely.

Try it: `hf-rlhf train quickstart 'kl=[{use: in_loss, estimator: k3}]' 'reference={use: doubling_copy}'`
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Reference

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class DoublingCopy(Reference):
    """The policy as it was at the last of the steps `first`, 2 x `first`, 4 x `first`, ..."""

    name = "doubling_copy"
    moves = True

    first: Count = 16
    """Optimizer steps before the first copy; each further copy comes after twice as many."""

    def build(self, policy: Any) -> torch.nn.Module:
        return copy.deepcopy(policy).eval().requires_grad_(False)

    @torch.no_grad()
    def move(self, model: torch.nn.Module, policy: Any, step: int) -> None:
        times, rest = divmod(step, self.first)
        if rest == 0 and times.bit_count() == 1:  # a power of two
            for old, new in zip(model.parameters(), policy.parameters(), strict=True):
                old.copy_(new)


@hookimpl
def reference() -> list[type[Reference]]:
    return [DoublingCopy]
