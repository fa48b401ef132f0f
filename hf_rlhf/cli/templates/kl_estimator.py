"""A bounded estimate of the KL: an alpha-divergence from sampled log-probs.

With r = ref/policy it is (r^alpha - 1 - alpha (r - 1)) / (alpha (alpha - 1)): never negative, 0 at r = 1, k3 as alpha
nears 0, and 1 / alpha at most where the reference finds a token less likely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval
from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import KLEstimator

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(KLEstimator):
    """The alpha-divergence of the policy and the reference at each sampled token, in nats near 0."""

    name = "my_name"
    metrics = (
        Metric(
            "headroom",
            "nats per token",
            "the most that a token can cost, less the rollout's mean k1",
            (0.0, None),
            "The estimate saturates and no longer pulls: lower `alpha`.",
        ),
    )

    alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    """The order: nearer to 0 it is nearer to k3 and less bounded."""

    def __post_init__(self) -> None:
        self._k1: float | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        for kl in algorithm.kl:
            if kl.estimator is self and kl.clamp is not None and kl.clamp >= 1 / self.alpha:
                yield (
                    f"clamp={kl.clamp:g} never binds, as alpha={self.alpha:g} bounds a token at {1 / self.alpha:g}: "
                    "leave clamp out"
                )

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        log_ratio = ref_logps - logps
        curve = (self.alpha * log_ratio).expm1() - self.alpha * log_ratio.expm1()
        return curve / (self.alpha * (self.alpha - 1))

    def observe(self, statistics: Mapping[str, float]) -> None:
        self._k1 = statistics.get("kl/rollout/token", self._k1)

    def report(self) -> Mapping[str, float]:
        return {} if self._k1 is None else {"headroom": 1 / self.alpha - self._k1}

    def state_dict(self) -> dict[str, Any]:
        return {"k1": self._k1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._k1 = state["k1"]


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [MyName]
