"""Surrogate with a penalty on the KL to the old policy (TRPO's penalized form, arXiv:1502.05477).

The coefficient follows PPO's rule (arXiv:1707.06347, section 4): it doubles after a rollout whose updates' mean KL exceeded
1.5 target and halves below target / 1.5. Departures: the KL is estimated from the sampled tokens by rho - 1 - log rho,
unbiased under the old policy; TRPO's maximum over states is taken per row (`reduce: max`), so that any split into
micro-batches is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import PolicyLoss, Positive

from ._ratio import bounded_exp, kl_from_old, log_ratio, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm

RANGE = 2.0**20


@dataclass(kw_only=True)
class TRPOPenalty(PolicyLoss):
    """-rho A + C KL(old || new); C stays within a factor of 2^20 of its start."""

    name = "trpo_penalty"
    words = "unclipped ratio with an adaptive penalty on the KL to the old policy (target {target:g})"
    metrics = (
        Metric("kl_old", "nats per token", "estimated KL(old, new) in the penalty", when="step"),
        Metric("kl_coef", "loss per nat", "coefficient C of the penalty", when="step"),
    )

    coef: Positive = 1.0
    """C in the first rollout."""
    target: Positive = 0.01
    """Target of KL(old || new) per token, in nats, that adapts C; compared with the mean for either `reduce`."""
    reduce: Literal["mean", "max"] = "mean"
    """`mean`: penalize each token's own KL; `max`: penalize the largest of its row."""

    def __post_init__(self) -> None:
        self._now = self.coef

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from unbound(algorithm, f"coef {self.coef:g}, target {self.target:g} and reduce {self.reduce}")

    def observe(self, statistics: Mapping[str, float]) -> None:
        kl = statistics.get("policy/approx_kl")
        if kl is None:
            return
        factor = 2.0 if kl > 1.5 * self.target else 0.5 if kl < self.target / 1.5 else 1.0
        self._now = min(max(self._now * factor, self.coef / RANGE), self.coef * RANGE)

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self._now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._now = state["coef"]

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        d = log_ratio(logps, old_logps, mask)
        kl = kl_from_old(d)
        if self.reduce == "max":  # 0 off the mask, nonnegative
            kl = kl.amax(1, keepdim=True).expand_as(d)
        loss = (-bounded_exp(d) * advantages + self._now * kl) * mask
        return loss, {"kl_old": kl.detach() * mask, "kl_coef": self._now * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [TRPOPenalty]
