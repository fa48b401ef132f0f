"""The clipped surrogate (PPO, arXiv:1707.06347). Equal bounds are PPO; a larger `epsilon_high` is DAPO's clip-higher
(arXiv:2503.14476)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Lt

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.algorithm import Algorithm


@dataclass(kw_only=True)
class PPOClip(PolicyLoss):
    """-min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) with rho = p / p_old.

    Clipping is gradient masking: where it bites, the token's gradient is 0; elsewhere it is the surrogate's.
    """

    name = "ppo_clip"

    epsilon_low: Annotated[float, Gt(0), Lt(1)] = 0.2
    """How far below 1 the ratio of a token with negative advantage may fall before its gradient is cut."""
    epsilon_high: Positive = 0.2
    """How far above 1 the ratio of a token with positive advantage may rise before its gradient is cut."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if algorithm.steps_per_rollout == 1:
            yield (
                f"epsilon_low {self.epsilon_low:g} and epsilon_high {self.epsilon_high:g} never "
                "bind, as the ratio stays 1 with one optimizer step per rollout (update.mini_batches x update.epochs)"
            )

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # filled before exp: an overflow off the mask would survive the multiplication by 0
        ratio = (logps - old_logps).masked_fill(mask == 0, 0.0).exp()
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        loss = -(ratio * advantages).minimum(clipped * advantages) * mask
        low = (advantages < 0) & (ratio < 1 - self.epsilon_low)
        high = (advantages > 0) & (ratio > 1 + self.epsilon_high)
        return loss, {"clip_frac_low": low.to(mask.dtype) * mask, "clip_frac_high": high.to(mask.dtype) * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [PPOClip]
