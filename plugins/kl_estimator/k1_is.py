"""k1 weighted by the ratio of the policy to the rollout policy (importance sampling of the KL estimate).

The ratio is 1 on-policy but carries the gradient that plain k1 lacks in the loss: at level sequence exactly that of the
KL, at level token the reverse KL's, state by state. This holds off-policy too, at the price of the ratio's variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class K1IS(KLEstimator):
    """rho l with l = log p - log p_ref and rho = p / p_old, also differentiated: unbiased, of either sign."""

    name = "k1_is"
    needs = frozenset({"old_logps"})

    def __call__(self, logps: Tensor, ref_logps: Tensor, *, old_logps: Tensor) -> Tensor:  # type: ignore[override]
        return (logps - old_logps).exp() * (logps - ref_logps)


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [K1IS]
