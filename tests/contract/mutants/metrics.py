"""Plugins whose metrics are wrong; see `base`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_rlhf import Metric
from hf_rlhf.axes import UpdateRule
from hf_rlhf.batch import Credit, Scored
from tests.contract.mutants.base import Estimator, Mutant
from tests.contract.mutants.losses import Loss
from tests.contract.mutants.models import Reward

SHARE = Metric("share", "share of rows", "rows above 0")


class Placed(Estimator):
    """Names the place of its axis, which is put before every name."""

    metrics = (Metric("advantage/share", "share of rows", "rows above 0"),)


class NoTuple(Estimator):
    """Declares a list."""

    metrics = [SHARE]  # type: ignore[assignment]  # noqa: RUF012


class Twice(Estimator):
    """Declares one name twice."""

    metrics = (SHARE, SHARE)


class Unexplained(Estimator):
    """Does not say what it measures."""

    metrics = (Metric("share", "share of rows", ""),)


class Conditional(Estimator):
    """Names a setting that is not there."""

    metrics = (Metric("share", "share of rows", "rows above 0", setting="strenght"),)


class Reporting(Estimator):
    """Reports what it does not declare."""

    def report(self) -> Mapping[str, float]:
        return {"share": 0.5}


class NotThere(Estimator):
    """Reports NaN where there is nothing to report."""

    metrics = (SHARE,)

    def report(self) -> Mapping[str, float]:
        return {"share": float("nan")}


class Tensors(Estimator):
    """Reports a tensor."""

    metrics = (SHARE,)

    def report(self) -> Mapping[str, Any]:
        return {"share": torch.tensor(0.5)}


class Crediting(Estimator):
    """Logs with its advantages what it does not declare."""

    def __call__(self, scored: Scored) -> Any:
        return Credit(advantages=super().__call__(scored), metrics={"share": 0.5})


class Groupwise(Estimator):
    """Gives a number per group."""

    metrics = (SHARE,)

    def __call__(self, scored: Scored) -> Any:
        return Credit(advantages=super().__call__(scored), metrics={"share": torch.ones(2)})


class Returning(Loss):
    """Returns a metric that it does not declare."""

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        loss, metrics = super().__call__(logps, old_logps, advantages, mask)
        return loss, {**metrics, "moved": mask}


class Endless(Loss):
    """Returns a metric that is infinite."""

    metrics = (Metric("pace", "tokens per nat", "how many tokens move the policy by a nat"),)

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        loss, metrics = super().__call__(logps, old_logps, advantages, mask)
        return loss, {**metrics, "pace": mask / 0.0}


class Counting(Reward):
    """Logs a metric that it does not declare."""

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        return {}, {"tokens": [1.0]}


class Missing(Reward):
    """Logs NaN for a row of which nothing is known."""

    metrics = (Metric("tokens", "tokens", "of a request"),)

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        return {}, {"tokens": [float("nan")]}


class Stepping(UpdateRule):
    """Logs of a step what it does not declare."""

    name = "wrong"

    def build(self, policy: torch.nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        given = {id(p) for group in groups for p in group["params"]}
        own = [p for p in policy.parameters() if id(p) not in given]
        return torch.optim.SGD([{"params": own}, *groups], lr=0.1)

    def take_logs(self) -> dict[str, float]:
        return {"length": 1.0}


MUTANTS = [
    Mutant(Placed, "metric names", "Leave advantage/ out"),
    Mutant(NoTuple, "metric names", "with the comma"),
    Mutant(Twice, "metric names", "more than once"),
    Mutant(Unexplained, "metric names", "does not say what it measures"),
    Mutant(Conditional, "metric names", "'strenght'"),
    Mutant(Reporting, "reports", r'does not declare.*Metric\("share"'),
    Mutant(NotThere, "reports", "Leave out missing values"),
    Mutant(Tensors, "reports", "got Tensor"),
    Mutant(Crediting, "credit metrics", "does not declare"),
    Mutant(Groupwise, "credit metrics", r"got \(2,\)"),
    Mutant(Returning, "returned metrics", "does not declare"),
    Mutant(Endless, "returned metrics", "not finite", ("degenerate", "few", "padding", "tools", "float32")),
    Mutant(Counting, "reward metrics", "does not declare"),
    Mutant(Missing, "reward metrics", "Leave out missing values"),
    Mutant(Stepping, "step metrics", "does not declare"),
]
