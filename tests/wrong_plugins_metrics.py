"""Plugins whose metrics are wrong; see `wrong_plugins`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from wrong_plugins import Estimator, Wrong
from wrong_plugins_losses import Loss
from wrong_plugins_models import Reward

from hf_rlhf import Metric
from hf_rlhf.axes import UpdateRule
from hf_rlhf.batch import Credit, Scored

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


WRONG = [
    Wrong(Placed, "metric names", "leave advantage/ out"),
    Wrong(NoTuple, "metric names", "with the comma"),
    Wrong(Twice, "metric names", "more than once"),
    Wrong(Unexplained, "metric names", "does not say what it measures"),
    Wrong(Conditional, "metric names", "'strenght'"),
    Wrong(Reporting, "reports", r'does not declare.*Metric\("share"'),
    Wrong(NotThere, "reports", "leave out what is not there"),
    Wrong(Tensors, "reports", "as a Tensor"),
    Wrong(Crediting, "credit metrics", "does not declare"),
    Wrong(Groupwise, "credit metrics", r"is \(2,\)"),
    Wrong(Returning, "returned metrics", "does not declare"),
    Wrong(Endless, "returned metrics", "not finite", ("degenerate", "few", "padding", "tools", "float32")),
    Wrong(Counting, "reward metrics", "does not declare"),
    Wrong(Missing, "reward metrics", "leave out what is not there"),
    Wrong(Stepping, "step metrics", "does not declare"),
]
