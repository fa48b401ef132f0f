"""Exponential moving average of the policy's weights (InstructGPT, arXiv:2203.02155, appendix C, with decay 0.992).

After every optimizer step: average <- decay x average + (1 - decay) x policy, weight by weight, starting from the policy before
the first step. Trained weights alone are averaged (of an adapter its factors), in float32 or better. Every process keeps its
own average, bit-identical to the others', so that nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_rlhf.modeling.lm_head import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "ema"
"""Folder of the average, a model of its own, in the output folder and in checkpoints."""


class PolicyEMA:
    """Average the trained weights of a policy."""

    def __init__(self, policy: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"update.ema must be between 0 and 1, got {decay}. Leave it out for no average")
        self.decay = decay
        self._trained = [p for p in policy.parameters() if p.requires_grad]
        self._average = [at_least_float32(p.detach()).clone() for p in self._trained]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average from the policy's current weights. Called after each optimizer step."""
        for x, p in zip(self._average, self._trained, strict=True):
            x.lerp_(at_least_float32(p), 1 - self.decay)

    def tensors(self) -> list[Tensor]:
        """Return the averages, in the order of the policy's trained parameters."""
        return list(self._average)

    @contextmanager
    def as_policy(self, policy: Any, *, exact: bool = False) -> Iterator[None]:
        """Put the average in place of the policy's weights, which are left untouched and come back at exit.

        The average is cast to the policy's dtype, to be run; with `exact` it keeps its own, to be saved or loaded in place.
        """
        there = {
            id(p): nn.Parameter(x if exact else x.to(p.device, p.dtype), requires_grad=False)
            for p, x in zip(self._trained, self._average, strict=True)
        }
        slots = [
            (module._parameters, name, p)
            for module in policy.modules()
            for name, p in module._parameters.items()
            if p is not None and id(p) in there
        ]
        if {id(p) for _, _, p in slots} != there.keys():
            raise ValueError("the average must be of this policy's own parameters, got a model with others")
        dtype = getattr(policy.config, "dtype", None)
        try:
            for parameters, name, p in slots:
                parameters[name] = there[id(p)]
            yield
        finally:
            for parameters, name, p in slots:
                parameters[name] = p
            policy.config.dtype = dtype  # save_pretrained writes that of the average into it


def average_bytes(policy: nn.Module) -> int:
    """Return the bytes that the average of a policy takes on its device."""
    return sum(p.numel() * max(4, p.element_size()) for p in policy.parameters() if p.requires_grad)
