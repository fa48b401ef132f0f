"""Clipped surrogate without the gradient of the tokens that collapse the entropy (Clip-Cov, arXiv:2505.22617).

Departures: the paper draws tokens at random among those with a covariance between two bounds, in every update; here the
tokens with the highest covariance are selected once per rollout over all its rows from old log-probs and advantages, so
that no split into micro-batches or processes changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss

from ._clip import Clipped
from ._covariance import SELECTED, Share, highest_covariance
from ._ratio import log_ratio

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class ClipCov(Clipped):
    """ppo_clip with gradient 0 on the selected tokens."""

    name = "clip_cov"
    metrics = (*Clipped.metrics, SELECTED)
    token_level = True
    zero_without_advantage = True
    needs = frozenset({"old_logps", "selected"})
    stops_gradient = True

    fraction: Share = 2e-4
    """Share of the rollout's tokens that are detached, at least one token; ties with the last add to it."""

    def in_words(self) -> str:
        return f"{super().in_words()}, no gradient on {self.fraction:.2g} of the tokens"

    def select(self, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return highest_covariance(old_logps, advantages, mask, self.fraction)

    # fields named in `needs` arrive as keywords, which the base class cannot list
    def __call__(  # type: ignore[override]
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, selected: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.clipped(log_ratio(logps, old_logps, mask), advantages, mask)
        return loss.detach().where(selected > 0, loss), {**metrics, "selected_frac": selected * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [ClipCov]
