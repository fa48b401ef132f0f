"""Surrogate with a KL to the old policy on the tokens that collapse the entropy (KL-Cov, arXiv:2505.22617).

Departures: tokens are selected once per rollout over all its rows from old log-probs and advantages, not in every update,
so that no split into micro-batches or processes changes them; the KL is estimated by rho - 1 - log rho, unbiased under the
old policy, where the authors' code uses |log rho|.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss, Positive

from ._covariance import SELECTED, Share, highest_covariance
from ._ratio import bounded_exp, kl_from_old, log_ratio, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class KLCov(PolicyLoss):
    """-rho A, plus beta (rho - 1 - log rho) on the selected tokens."""

    name = "kl_cov"
    words = "unclipped ratio, and {beta:g} x KL to the old policy on {fraction:.2g} of the tokens"
    metrics = (SELECTED,)
    token_level = True
    needs = frozenset({"old_logps", "selected"})

    fraction: Share = 2e-4
    """Share of the rollout's tokens that are penalized, at least one token; ties with the last add to it."""
    beta: Positive = 1.0
    """Factor of their KL to the old policy."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from unbound(algorithm, f"fraction {self.fraction:g} and beta {self.beta:g}")

    def select(self, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return highest_covariance(old_logps, advantages, mask, self.fraction)

    # fields named in `needs` arrive as keywords, which the base class cannot list
    def __call__(  # type: ignore[override]
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, selected: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        d = log_ratio(logps, old_logps, mask)
        loss = -bounded_exp(d) * advantages + self.beta * kl_from_old(d) * selected
        return loss * mask, {"selected_frac": selected * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [KLCov]
