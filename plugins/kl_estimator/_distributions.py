"""Base of the divergences between next-token distributions, over the whole vocabulary or the reference's most likely tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf.axes import Count, KLEstimator, with_rest

if TYPE_CHECKING:
    from torch import Tensor

IMPOSSIBLE = -1e4
"""Stand-in for a log-prob of -inf: its probability is 0 in every dtype, and it stays finite under any factor."""


@dataclass(kw_only=True)
class OverDistributions(KLEstimator):
    """A divergence of p, the policy's next-token distribution, and q, the reference's."""

    needs = frozenset({"full_distribution"})

    top_k: Count | None = None
    """Compare the probabilities of the reference's `top_k` most likely tokens and of all others as one event: a lower bound of
    the divergence, without a gradient between those others. None: the whole vocabulary."""

    def in_words(self) -> str:
        return super().in_words() + (f" over the reference's top {self.top_k}" if self.top_k is not None else "")

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        if self.top_k is not None and ref_logps.size(-1) > self.top_k + 1:  # else the rest is one event, or nothing
            top, ids = ref_logps.topk(self.top_k, -1)
            logps, ref_logps = with_rest(logps.gather(-1, ids)), with_rest(top)
        return self.divergence(logps, ref_logps)

    @abstractmethod
    def divergence(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """Map log-probs (n, K) and (n, K) of K exclusive events to (n,)."""


def reverse(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return KL(p || q) = sum of p (log p - log q); events with p = 0 contribute 0."""
    difference = (logps - ref_logps).masked_fill(logps == float("-inf"), 0.0)
    return (logps.exp() * difference).sum(-1)


def forward(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return KL(q || p) = sum of q (log q - log p); events with q = 0 contribute 0."""
    return reverse(ref_logps, logps)
