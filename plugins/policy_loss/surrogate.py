"""Negative ratio times advantage: importance sampling without a clip (the surrogate of TRPO, arXiv:1502.05477)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss

from ._ratio import bounded_exp, log_ratio

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Surrogate(PolicyLoss):
    """-rho A with rho = p / p_old, token by token; at rho = 1 its gradient is that of reinforce."""

    name = "surrogate"
    words = "unclipped ratio"
    token_level = True
    zero_without_advantage = True

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -(bounded_exp(log_ratio(logps, old_logps, mask)) * advantages) * mask, {}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [Surrogate]
