"""What an estimator's expected gradients are, found by trying it: placements ask this instead of its name.

The trial is one state with five tokens, in float64, every expectation summed out. A gradient that equals a divergence's
there equals it state by state at level token, and between whole completions at level sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import KLEstimator

TRIED = frozenset({"old_logps", "ref_logps", "full_distribution"})
"""Needs that the trial can meet."""
KL, REVERSED, L1 = "KL(policy || reference)", "KL(reference || policy)", "the L1 distance (twice the total variation)"


@dataclass(frozen=True)
class Trial:
    """`loss`: E[grad e], what the estimator does in the loss; `score`: E[e grad log p], what it does in reward or advantage.

    Together they are the gradient of E[e]. `stale` is `loss` on tokens of another policy, which is old_logps.
    """

    loss: Tensor
    score: Tensor
    stale: Tensor
    divergences: dict[str, Tensor]

    def named(self, gradient: Tensor) -> str | None:
        """The divergence whose gradient this is."""
        return next((name for name, x in self.divergences.items() if same(gradient, x)), None)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding."""
    return bool((a - b).abs().max() < 1e-9)


def trial(estimator: KLEstimator) -> Trial | None:
    """The estimator's expected gradients, or None where it needs what the trial has not."""
    if estimator.needs - TRIED:
        return None
    import torch

    logits, reference, other = (
        torch.tensor(x, dtype=torch.float64).log()
        for x in ([0.35, 0.25, 0.2, 0.15, 0.05], [0.1, 0.3, 0.15, 0.25, 0.2], [0.2, 0.1, 0.3, 0.15, 0.25])
    )
    with torch.enable_grad():
        logits.requires_grad_()
        logps = logits.log_softmax(0)
        p, q = logps.exp(), reference.exp()

        def gradient(x: Tensor) -> Tensor:
            found = torch.autograd.grad(x, logits, retain_graph=True, allow_unused=True)[0]
            return torch.zeros_like(logits) if found is None else found

        def estimate(old_logps: Tensor) -> Tensor:
            known: dict[str, Any] = {"old_logps": old_logps} if "old_logps" in estimator.needs else {}
            if "full_distribution" in estimator.needs:
                return estimator(logps[None], reference[None], **known).expand(5)
            return estimator(logps, reference, **known)

        mine, stale = estimate(logps.detach()), estimate(other)
        return Trial(
            loss=gradient((p.detach() * mine).sum()),
            score=gradient((p.detach() * mine.detach() * logps).sum()),
            stale=gradient((other.exp() * stale).sum()),
            divergences={
                KL: gradient((p * (logps - reference)).sum()),
                REVERSED: gradient((q * (reference - logps)).sum()),
                L1: gradient((p - q).abs().sum()),
            },
        )


def is_linear(estimator: KLEstimator) -> bool:
    """Whether the slope in the log-ratio is one number, as k1's is.

    The expected gradient in the loss is then that number times E[grad log p] = 0. Estimators that need more than the
    two log-probs are not tried and count as not linear.
    """
    if estimator.needs:
        return False
    import torch

    with torch.enable_grad():
        logps = torch.linspace(-3.0, -1.0, 9, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(estimator(logps, torch.full_like(logps, -2.0)).sum(), logps)
    return bool((slope.max() - slope.min()).abs() < 1e-9)


def is_exponential(estimator: KLEstimator) -> bool:
    """Whether a log-ratio of -30 nats, a usual sum over a completion, gives more than a million, as k3's does."""
    if estimator.needs - {"old_logps", "ref_logps"}:
        return False
    import torch

    logps = torch.tensor([-30.0])
    known: dict[str, Any] = {"old_logps": logps} if "old_logps" in estimator.needs else {}
    return bool(estimator(logps, torch.tensor([0.0]), **known).abs() > 1e6)
