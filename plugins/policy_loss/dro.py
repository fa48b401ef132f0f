"""Policy gradient with a squared log-ratio as its bound (DRO, arXiv:2405.19107, section 3, per token).

The paper regresses beta log(p / p_ref) of whole completions on reward minus value. Half of that square over beta, without its
constant, is this loss, with the advantage of each token in place of the difference and the old policy as the reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import PolicyLoss, Positive

from ._ratio import log_ratio, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class DRO(PolicyLoss):
    """-(A log p - beta / 2 (log p - log p_old)^2)."""

    name = "dro"
    words = "policy gradient, bounded by {beta:g} times half the squared log-ratio"
    metrics = (
        Metric(
            "squared_log_ratio", "nats^2", "mean over tokens of the squared log-ratio to the old policy", when="step"
        ),
    )
    token_level = True

    beta: Positive = 0.1
    """Weight of the bound: alone, a token's log-prob moves by A / beta."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from unbound(algorithm, f"beta {self.beta:g}")

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        d = log_ratio(logps, old_logps, mask)
        loss = (self.beta / 2 * d.square() - advantages * logps.masked_fill(mask == 0, 0.0)) * mask
        return loss, {"squared_log_ratio": d.detach().square() * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [DRO]
