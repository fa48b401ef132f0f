"""Trust region in probability instead of ratio (DPPO with binary total variation, arXiv:2602.04879).

|p - p_old| is the total variation between the two policies restricted to the event of the sampled token. A ratio hardly
limits likely tokens and hardly lets rare ones move; this bound treats both alike. Departure: the denominator of rho is
always the trainer's old log-probs; with `anchor: sampler` its mismatch is left to `rollout_correction`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Interval

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss

from ._anchor import Anchored
from ._clip import HIGH, LOW
from ._ratio import bounded_exp, log_ratio, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class DPPOTV(Anchored):
    """-sg(min(rho, c)) A log p M; M is 0 where A > 0 and p - p_old > high, or A <= 0 and p_old - p > low, else 1."""

    name = "dppo_tv"
    metrics = (
        replace(LOW, meaning="bad token whose probability fell by more than `low`: no gradient"),
        replace(HIGH, meaning="good token whose probability rose by more than `high`: no gradient"),
    )
    token_level = True
    zero_without_advantage = True
    stops_gradient = True

    low: Annotated[float, Interval(gt=0, le=1)] = 0.15
    """Largest decrease in probability of a token with A <= 0 before its gradient becomes 0."""
    high: Annotated[float, Interval(gt=0, le=1)] = 0.15
    """Largest increase in probability of a token with A > 0 before its gradient becomes 0."""
    c: Annotated[float, Ge(1)] = 20.0
    """Largest ratio that weights a token's gradient."""

    def in_words(self) -> str:
        return (
            f"no gradient where a probability rose by {self.high:g} or fell by {self.low:g}; ratio at most {self.c:g}"
        )

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        bounds = f"low {self.low:g}, high {self.high:g} and c {self.c:g}" if self.anchor == "old" else f"c {self.c:g}"
        yield from unbound(algorithm, bounds)

    def __call__(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        sampler_logps: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        off = mask == 0
        logps, anchor = logps.masked_fill(off, 0.0), self.anchored(old_logps, sampler_logps)
        moved = logps.detach().exp() - anchor.masked_fill(off, 0.0).exp()
        high, low = (advantages > 0) & (moved > self.high), (advantages <= 0) & (moved < -self.low)
        weight = bounded_exp(log_ratio(logps.detach(), old_logps, mask)).clamp(max=self.c) * ~(high | low)
        metrics = {"clip_frac/low": low.to(mask.dtype) * mask, "clip_frac/high": high.to(mask.dtype) * mask}
        return -(weight * advantages * logps) * mask, metrics


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [DPPOTV]
