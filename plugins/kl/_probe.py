"""Expected gradients of a KL estimator, found by evaluating it, so that placements need not branch on its name.

The trial has one state with five tokens, in float64, and sums every expectation exactly. A gradient that equals a
divergence's there equals it state by state at level token, and between whole completions at level sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import check_output

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import KLEstimator

TRIED = frozenset({"old_logps", "ref_logps", "full_distribution"})
"""Values of `needs` that the trial provides."""
KL, REVERSED, L1 = "KL(policy || reference)", "KL(reference || policy)", "the L1 distance (twice the total variation)"


@dataclass(frozen=True)
class Trial:
    """Expected gradients of an estimator e: `loss` is E[grad e], in the loss; `score` is E[e grad log p], in the reward.

    `score` applies to the advantage too. Their sum is the gradient of E[e]. `stale` is `loss` on tokens sampled from
    another policy, old_logps.
    """

    loss: Tensor
    score: Tensor
    stale: Tensor
    divergences: dict[str, Tensor]

    def named(self, gradient: Tensor) -> str | None:
        """Return the name of the divergence with this gradient, or None."""
        return next((name for name, x in self.divergences.items() if same(gradient, x)), None)


def same(a: Tensor, b: Tensor) -> bool:
    """Return True if the tensors are equal up to rounding."""
    return bool((a - b).abs().max() < 1e-9)


def trial(estimator: KLEstimator) -> Trial | None:
    """Return the estimator's expected gradients, or None if it needs more than the trial provides."""
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
                return _checked(estimator, logps[None], reference[None], **known).expand(5)
            return _checked(estimator, logps, reference, **known)

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
    """Return True if the slope in the log-ratio is constant, as for k1.

    The expected gradient in the loss is then a multiple of E[grad log p] = 0. Estimators that need more than the two
    log-probs are not evaluated and count as nonlinear.
    """
    if estimator.needs:
        return False
    import torch

    with torch.enable_grad():
        logps = torch.linspace(-3.0, -1.0, 9, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(_checked(estimator, logps, torch.full_like(logps, -2.0)).sum(), logps)
    return bool((slope.max() - slope.min()).abs() < 1e-9)


def is_exponential(estimator: KLEstimator) -> bool:
    """Return True if a log-ratio of -30 nats, a usual sum over a completion, gives more than a million, as for k3."""
    if estimator.needs - {"old_logps", "ref_logps"}:
        return False
    import torch

    logps = torch.tensor([-30.0])
    known: dict[str, Any] = {"old_logps": logps} if "old_logps" in estimator.needs else {}
    return bool(_checked(estimator, logps, torch.tensor([0.0]), **known).abs() > 1e6)


def _checked(estimator: KLEstimator, logps: Tensor, reference: Tensor, **known: Tensor) -> Tensor:
    """Return the estimate, checked as in a run."""
    kl = estimator(logps, reference, **known)
    check_output("kl_estimator", estimator, kl, logps if logps.dim() == 1 else logps[:, 0], inputs={"logps": logps})
    return kl
