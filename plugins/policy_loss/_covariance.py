"""Selection of the tokens that reduce the entropy most, by covariance of advantage and log-prob (arXiv:2505.22617)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from hf_rlhf import Metric

if TYPE_CHECKING:
    from torch import Tensor

SELECTED = Metric("selected_frac", "share of tokens", "selected for their covariance", when="step")
Share = Annotated[float, Interval(gt=0, le=1)]


def highest_covariance(old_logps: Tensor, advantages: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Return (N, T): 1 on the `fraction` of tokens (at least one) with the highest (A - mean A)(log p - mean log p).

    Means are over the mask. Ties with the last selected token are included; tokens without positive covariance are not.
    """
    on = mask > 0
    count = on.sum()
    if count == 0:
        return mask * 0
    centred = [x - x.sum() / count for x in (old_logps.masked_fill(~on, 0.0), advantages.masked_fill(~on, 0.0))]
    covariance = (centred[0] * centred[1]).masked_fill(~on, float("-inf"))
    highest = covariance.flatten().topk(max(1, int(fraction * count))).values
    return ((covariance >= highest[-1]) & (covariance > 0)).to(mask.dtype) * mask
