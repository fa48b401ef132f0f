"""Clipped surrogate with a lower bound on the objective of bad tokens (dual-clip PPO, arXiv:1912.09729).

ppo_clip leaves a token with negative advantage unbounded as its ratio grows; here it is bounded at `c`, TRL's `delta`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import PolicyLoss

from ._clip import Clipped
from ._ratio import log_ratio, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class DualClip(Clipped):
    """min(ppo_clip, -c A) for A < 0, else ppo_clip: a bad token's gradient is 0 beyond rho = c."""

    name = "dual_clip"
    metrics = (
        *Clipped.metrics,
        Metric(
            "clip_frac/dual",
            "share of tokens",
            "negative advantage and ratio above `c`: the gradient is cut",
            (None, 0.1),
            "Bad tokens became much more likely: the sampler is stale, or the update too large.",
            when="step",
        ),
    )
    token_level = True
    zero_without_advantage = True

    c: Annotated[float, Gt(1)] = 3.0
    """Ratio above which a token with negative advantage has gradient 0."""

    def in_words(self) -> str:
        return f"{super().in_words()}, for bad tokens at most {self.c:g}"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        bounds = f"epsilon_low {self.epsilon_low:g}, epsilon_high {self.epsilon_high:g} and c {self.c:g}"
        yield from unbound(algorithm, bounds)

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.clipped(log_ratio(logps, old_logps, mask), advantages, mask)
        floor = -self.c * advantages * mask
        dual = (advantages < 0) & (loss > floor)
        return floor.where(dual, loss), {**metrics, "clip_frac/dual": dual.to(mask.dtype) * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [DualClip]
