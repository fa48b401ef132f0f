"""Clipped surrogate of any log-ratio, shared by several losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Gt, Lt

from hf_rlhf import Metric
from hf_rlhf.axes import PolicyLoss, Positive

from ._ratio import bounded_exp, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm

FAR = "The update moves far from the rollout policy: lower the learning rate, `update.epochs` or `update.mini_batches`."
HIGH = Metric(
    "clip_frac/high",
    "share of tokens",
    "positive advantage and ratio above its upper bound: the gradient is cut",
    (None, 0.3),
    f"{FAR} Always near 0 with a falling entropy: the bound does not bind; see `epsilon_high`.",
    when="step",
)
LOW = Metric(
    "clip_frac/low",
    "share of tokens",
    "negative advantage and ratio below its lower bound: the gradient is cut",
    (None, 0.3),
    FAR,
    when="step",
)


@dataclass(kw_only=True)
class Clipped(PolicyLoss):
    """Base class of losses that clip a ratio to [1 - epsilon_low, 1 + epsilon_high]."""

    metrics: ClassVar[tuple[Metric, ...]] = (LOW, HIGH)

    epsilon_low: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Distance below 1 at which the ratio of a token with negative advantage is clipped and its gradient becomes 0."""
    epsilon_high: Positive = 0.2
    """Distance above 1 at which the ratio of a token with positive advantage is clipped and its gradient becomes 0."""

    def in_words(self) -> str:
        return f"ratio {self.bounds()}"

    def bounds(self) -> str:
        """Return the bounds of the ratio in words."""
        return f"clipped to [{1 - self.epsilon_low:.5g}, {1 + self.epsilon_high:.5g}]"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from unbound(algorithm, f"epsilon_low {self.epsilon_low:g} and epsilon_high {self.epsilon_high:g}")

    def clipped(self, log_ratios: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return -min(rho A, clip(rho) A) and the clip metrics, (B, T) each and 0 off the mask."""
        ratio = bounded_exp(log_ratios)
        bounded = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        loss = -(ratio * advantages).minimum(bounded * advantages) * mask
        low = (advantages < 0) & (ratio < 1 - self.epsilon_low)
        high = (advantages > 0) & (ratio > 1 + self.epsilon_high)
        return loss, {"clip_frac/low": low.to(mask.dtype) * mask, "clip_frac/high": high.to(mask.dtype) * mask}
