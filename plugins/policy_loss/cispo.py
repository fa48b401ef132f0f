"""REINFORCE weighted by a clipped ratio (CISPO, arXiv:2506.13585): weights are bounded and no token loses its gradient.

The paper clips to [1 - epsilon_low, 1 + epsilon_high] and sets epsilon_low so that it does not bind. TRL and ScaleRL
(arXiv:2510.13786) set the largest weight itself: `bound: absolute` with `epsilon_low: 1`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Le

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss, Positive

from ._clip import HIGH, LOW
from ._ratio import bounded_exp, log_ratio, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class CISPO(PolicyLoss):
    """-sg(clip(rho, 1 - epsilon_low, 1 + epsilon_high)) A log p, where sg stops the gradient."""

    name = "cispo"
    metrics = (
        replace(LOW, meaning="negative advantage and ratio below its lower bound: the weight is bounded"),
        replace(HIGH, meaning="positive advantage and ratio above its upper bound: the weight is bounded"),
    )
    token_level = True
    zero_without_advantage = True
    stops_gradient = True

    epsilon_low: Annotated[float, Gt(0), Le(1)] = 1.0
    """The smallest weight is 1 - epsilon_low; 1 sets no lower bound."""
    epsilon_high: Positive = 4.0
    """The largest weight is 1 + epsilon_high, or epsilon_high itself with `bound: absolute`."""
    bound: Literal["relative", "absolute"] = "relative"
    """Meaning of epsilon_high: the distance from 1 (the paper, verl), or the largest weight (TRL, ScaleRL)."""

    def in_words(self) -> str:
        return f"policy gradient weighted by the ratio clipped to [{1 - self.epsilon_low:g}, {self.largest:g}]"

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.largest < 1:
            yield (
                f"epsilon_high must be at least 1 with bound=absolute, got {self.epsilon_high:g}: it would bind at ratio 1. "
                f"Set policy_loss.epsilon_high={1 + self.epsilon_high:g} or policy_loss.bound=relative"
            )

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        bounds = f"epsilon_low {self.epsilon_low:g}, epsilon_high {self.epsilon_high:g} ({self.bound})"
        yield from unbound(algorithm, bounds)

    @property
    def largest(self) -> float:
        """Largest weight of a token."""
        return self.epsilon_high if self.bound == "absolute" else 1 + self.epsilon_high

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = bounded_exp(log_ratio(logps, old_logps, mask)).detach()
        weight = ratio.clamp(1 - self.epsilon_low, self.largest)
        loss = -(weight * advantages * logps.masked_fill(mask == 0, 0.0)) * mask
        low, high = ratio < 1 - self.epsilon_low, ratio > self.largest
        return loss, {"clip_frac/low": low.to(mask.dtype) * mask, "clip_frac/high": high.to(mask.dtype) * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [CISPO]
