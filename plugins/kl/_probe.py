"""What an estimator does to the log-ratio, found by trying it: placements ask this instead of its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_rlhf.axes import KLEstimator


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
    if estimator.needs:
        return False
    import torch

    return bool(estimator(torch.tensor([-30.0]), torch.tensor([0.0])).abs() > 1e6)
