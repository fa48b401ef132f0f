"""Clipped surrogate of one ratio per row: its tokens' geometric mean (GSPO, arXiv:2507.18071) or their product.

The paper's mean over rows of one term each is `aggregation: seq_mean_token_mean`; with `seq_mean_token_sum` it is LUSPO.
The product is not in the paper: it is the ratio of the whole completion, which TRL clips in RLOO (arXiv:2402.14740).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Lt

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss, Positive

from ._clip import Clipped
from ._ratio import log_ratio, row_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class GSPO(Clipped):
    """-min(s A, clip(s, 1 - epsilon_low, 1 + epsilon_high) A), s = exp(mean or sum over the row of log p - log p_old).

    If a row has one advantage and its n tokens have equal weights, both levels have the same gradient with the mean; with
    the product that of `sequence` is n times that of `token`.
    """

    name = "gspo"
    zero_without_advantage = True
    stops_gradient = True

    level: Literal["sequence", "token"] = "sequence"
    """`sequence`: every token has s, whose gradient reaches the whole row; `token`: sg(s) p / sg(p), the value of s with
    the gradient of the token itself, for advantages that differ between tokens (GSPO-token)."""
    ratio: Literal["mean", "product"] = "mean"
    """Definition of s: the geometric `mean` of the row's ratios, or their `product`, the ratio of the whole completion. With
    `product` each token has the gradient of the row: `seq_mean_token_mean` gives that of a sum over its tokens, at s = 1
    the one of `reinforce` with `seq_mean_token_sum`. Longer rows leave the bounds sooner, so set them wider; above e^20 it
    counts as e^20, without gradient."""
    epsilon_low: Annotated[float, Gt(0), Lt(1)] = 3e-4
    """Distance below 1 at which a row's ratio is clipped for tokens with negative advantage."""
    epsilon_high: Positive = 4e-4
    """Distance above 1 at which a row's ratio is clipped for tokens with positive advantage."""

    def in_words(self) -> str:
        mean = "geometric mean" if self.ratio == "mean" else "product"
        return f"{mean} of the row's ratios {self.bounds()}"

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own = log_ratio(logps, old_logps, mask)
        row = row_mean(own, mask) if self.ratio == "mean" else own.sum(1, keepdim=True)
        whole = row.expand_as(own)
        if self.level == "token":
            whole = whole.detach() + own - own.detach()
        return self.clipped(whole, advantages, mask)


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [GSPO]
