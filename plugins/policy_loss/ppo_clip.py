"""Clipped surrogate (PPO, arXiv:1707.06347). Equal bounds are PPO; a larger `epsilon_high` is DAPO's clip-higher
(arXiv:2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss

from ._clip import Clipped
from ._ratio import log_ratio

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class PPOClip(Clipped):
    """-min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) with rho = p / p_old.

    Where the clip binds, the token's gradient is 0; elsewhere it is the surrogate's.
    """

    name = "ppo_clip"
    token_level = True
    zero_without_advantage = True

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.clipped(log_ratio(logps, old_logps, mask), advantages, mask)


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [PPOClip]
