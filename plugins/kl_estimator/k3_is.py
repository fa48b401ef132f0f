"""k3 weighted by the ratio of the policy to the rollout policy (as in DeepSeek-V3.2, arXiv:2512.02556).

Its expected gradient in the loss stays the same off-policy: at level sequence that of the KL, at level token the reverse
KL's, state by state, at the states visited by the rollout policy. The price is the ratio's variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class K3IS(KLEstimator):
    """rho (exp(-l) - 1 + l) with l = log p - log p_ref and rho = p / p_old, also differentiated."""

    name = "k3_is"
    needs = frozenset({"old_logps"})

    def __call__(self, logps: Tensor, ref_logps: Tensor, *, old_logps: Tensor) -> Tensor:  # type: ignore[override]
        difference = logps - ref_logps
        return (logps - old_logps).exp() * ((-difference).expm1() + difference)


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [K3IS]
