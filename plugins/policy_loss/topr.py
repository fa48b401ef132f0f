"""REINFORCE whose bad rows lose weight as they become unlikely (TOPR, arXiv:2503.14286): stable far off-policy.

The paper weights negative rows by min(pi / mu, 1) over the whole sequence and takes the sign from the reward, as
`level: sequence` and `sign: score` do, where a score of 0 counts as bad. By default the sign is that of the advantage,
the reward after its baseline.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss

from ._clip import HIGH
from ._ratio import log_ratio, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class TOPR(PolicyLoss):
    """-A log p if A > 0, else -sg(min(rho, 1)) A log p with rho the ratio of the whole row."""

    name = "topr"
    metrics = (
        replace(HIGH, meaning="bad row (or token) whose ratio is above 1: its weight is bounded by 1", healthy=None),
    )
    zero_without_advantage = True
    stops_gradient = True

    level: Literal["sequence", "token"] = "sequence"
    """Ratio rho of the whole row, exp(sum of log p - log p_old), or of each token."""
    sign: Literal["advantage", "score"] = "advantage"
    """Quantity that must be positive for a token's full gradient: its advantage, or its row's total score before KL."""

    def in_words(self) -> str:
        return f"policy gradient, bad rows weighted by the {self.level}'s ratio, at most 1"

    def __post_init__(self) -> None:
        if self.sign == "score":
            self.needs = self.needs | {"total_score"}  # type: ignore[misc]

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from unbound(algorithm, f"level {self.level} and sign {self.sign}")

    def __call__(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        total_score: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        d = log_ratio(logps.detach(), old_logps, mask)
        if self.level == "sequence":
            d = d.sum(1, keepdim=True).expand_as(d)
        good = advantages > 0
        if self.sign == "score":
            assert total_score is not None, "filled because `needs` names it"
            good = (total_score > 0).unsqueeze(1).expand_as(d)
        weight = d.clamp(max=0).exp().masked_fill(good, 1.0)
        loss = -(weight * advantages * logps.masked_fill(mask == 0, 0.0)) * mask
        return loss, {"clip_frac/high": (~good & (d > 0)).to(mask.dtype) * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [TOPR]
