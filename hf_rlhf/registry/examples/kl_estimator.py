"""The Jeffreys divergence from sampled log-probs: KL(policy || ref) + KL(ref || policy).

Try it: `hf-rlhf train quickstart 'kl=[{use: in_loss, estimator: jeffreys}]'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator
from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class Jeffreys(KLEstimator):
    """l (1 - exp(-l)) with l = logps - ref_logps, whose mean over the policy's tokens is the divergence."""

    name = "jeffreys"

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        log_ratio = logps - ref_logps
        return log_ratio * (1 - (-log_ratio).exp())


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [Jeffreys]
