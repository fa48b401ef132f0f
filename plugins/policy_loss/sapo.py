"""Soft gate instead of a clip (SAPO, arXiv:2511.20347): the gradient decays as the ratio departs from 1."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss, Positive

from ._ratio import bounded_exp, log_ratio, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class SAPO(PolicyLoss):
    """-(4 / tau) sigmoid(tau (rho - 1)) A: the surrogate's gradient times 4 g (1 - g), g = sigmoid(tau (rho - 1))."""

    name = "sapo"
    words = "softly clipped ratio (tau {tau_positive:g} for good tokens, {tau_negative:g} for bad ones)"
    token_level = True
    zero_without_advantage = True

    tau_positive: Positive = 1.0
    """Decay rate of the gradient of tokens with positive advantage."""
    tau_negative: Positive = 1.05
    """Decay rate of the gradient of all other tokens."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from unbound(algorithm, f"tau_positive {self.tau_positive:g} and tau_negative {self.tau_negative:g}")

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        ratio = bounded_exp(log_ratio(logps, old_logps, mask))
        tau = torch.where(advantages > 0, self.tau_positive, self.tau_negative).to(ratio.dtype)
        return -(4 / tau * (tau * (ratio - 1)).sigmoid() * advantages) * mask, {}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [SAPO]
