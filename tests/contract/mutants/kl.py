"""Wrong KL estimators, placements and controllers; see `base`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.axes import KLController, KLEstimator, KLPlacement
from tests.contract.mutants.base import Mutant, settings


class Flipped(KLEstimator):
    """log p_ref - log p: the KL's sign flipped, which pays for leaving the reference (Unakar/Logic-RL#58)."""

    name = "wrong"

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        return ref_logps - logps


class Offset(KLEstimator):
    """Is not 0 where policy and reference agree: the 1 of k3 left out."""

    name = "wrong"

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        return (ref_logps - logps).exp() + logps - ref_logps


class SequenceRatio(KLEstimator):
    """Weighs the KL of each token by the ratio of its whole row."""

    name = "wrong"
    needs = frozenset({"old_logps"})

    def __call__(self, logps: Tensor, ref_logps: Tensor, *, old_logps: Tensor) -> Tensor:
        return (logps - old_logps).sum(-1, keepdim=True).clamp(-1, 1).exp() * (logps - ref_logps) ** 2 / 2


class Frozen(KLEstimator):
    """Has the right value and no gradient."""

    name = "wrong"

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        return (logps - ref_logps).detach() ** 2 / 2


class Placement(KLPlacement):
    """A right placement, to be made wrong."""

    name = "wrong"
    places = frozenset({"loss"})

    def loss_penalty(self, kl: Tensor) -> Tensor:
        return 0.1 * kl


class Paid(Placement):
    """Subtracts the KL from the loss: training maximises it (qiancheng0/ToolRL#52)."""

    def loss_penalty(self, kl: Tensor) -> Tensor:
        return -0.1 * kl


class DetachedPenalty(Placement):
    """Puts a number into the loss, not a function of the policy."""

    def loss_penalty(self, kl: Tensor) -> Tensor:
        return 0.1 * kl.detach()


class RowMean(Placement):
    """Gives every token its row's mean over all columns, padding included (natolambert/rlhf-book#216)."""

    places = frozenset({"reward"})

    def reward_penalty(self, kl: Tensor) -> Tensor:
        return 0.1 * kl.mean(-1, keepdim=True).expand_as(kl)


class Squashed(Placement):
    """Sums its penalty over the tokens."""

    places = frozenset({"reward"})

    def reward_penalty(self, kl: Tensor) -> Tensor:
        return kl.sum(-1)


class Undefined(KLPlacement):
    """Declares a place and no penalty for it."""

    name = "wrong"
    places = frozenset({"loss"})


class Elsewhere(KLPlacement):
    """Misspells its place: the KL would enter nowhere."""

    name = "wrong"
    places = frozenset({"rewards"})


@settings
class Controller(KLController):
    """Follows a target, to be made wrong."""

    name = "wrong"

    def __post_init__(self) -> None:
        self._factor = 1.0

    def observe(self, statistics: Mapping[str, float]) -> None:
        self._factor *= self.step(statistics["kl/rollout/sequence"] / 6 - 1)

    def step(self, error: float) -> float:
        return 1 + 0.1 * min(max(error, -0.2), 0.2)

    def __call__(self, beta: float) -> float:
        return beta * self._factor

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self._factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factor = state["factor"]


class Unbounded(Controller):
    """Follows the error without a bound, so that beta becomes negative or explodes (OpenRLHF/OpenRLHF#1289)."""

    def step(self, error: float) -> float:
        return 1 + 1.5 * error


class Inverted(Controller):
    """Lowers beta where the KL is too large."""

    def step(self, error: float) -> float:
        return super().step(-error)


class Restarted(Controller):
    """Is not in the checkpoint: beta starts anew after each resume (verl-project/verl#2653)."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Restless(Controller):
    """Moves beta when it is asked, once per micro-batch, not once per rollout."""

    def __call__(self, beta: float) -> float:
        self._factor *= 1.01
        return beta * self._factor


def k2() -> Any:
    return load_plugin("kl_estimator", "k2")


MUTANTS = [
    Mutant(Flipped, "positive", "log p - log p_ref"),
    Mutant(Offset, "zero", "policy and reference agree"),
    Mutant(SequenceRatio, "elementwise", "The core sums over a row"),
    Mutant(Frozen, "gradient", "no gradient reaches logps"),
    Mutant(lambda: Paid(estimator=k2()), "penalty", "falls as the KL grows"),
    Mutant(lambda: DetachedPenalty(estimator=k2()), "kl gradient", "no gradient"),
    Mutant(lambda: RowMean(estimator=k2()), "padding", "Count with the mask", ("tools", "split")),
    Mutant(lambda: Squashed(estimator=k2()), "shape", "reward_penalty must have shape"),
    Mutant(lambda: Undefined(estimator=k2()), "shape", "does not define loss_penalty"),
    Mutant(lambda: Elsewhere(estimator=k2()), "places", "unknown places"),
    Mutant(Unbounded, "sane", "beta is"),
    Mutant(Inverted, "rises", "Check the sign"),
    Mutant(Restarted, "state", "observe changes _factor"),
    Mutant(Restless, "asking", "called twice"),
]
