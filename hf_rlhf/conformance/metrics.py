"""Checks of metrics, as functions that raise AssertionError: declared, named and finite."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar
from unittest import SkipTest

from torch import Tensor

from hf_rlhf.axes import AXES, AdvantageEstimator, Plugin, PolicyLoss
from hf_rlhf.batch import Credit
from hf_rlhf.conformance.common import Checks, Statistics, duplicate, observe, with_nested
from hf_rlhf.conformance.tensor_inputs import OUTPUTS, as_scored, ordinary_tensors
from hf_rlhf.contract.metric import Metric, pattern
from hf_rlhf.metrics.names import under

NAME = re.compile(r"[\w.@<>-]+(/[\w.@<>-]+)*")


def metric_checks(plugin: Plugin, axis: str, history: Statistics) -> Checks:
    """Yield the checks of a plugin's metrics. `history` holds the statistics of two rollouts."""
    yield "metrics are named below its axis and explained", lambda: _are_named(plugin, axis)
    yield "reported metrics are declared and finite", lambda: _reports(plugin, history)
    if isinstance(plugin, PolicyLoss):
        yield "returned metrics are declared and finite", lambda: _returns(plugin)
    if isinstance(plugin, AdvantageEstimator):
        yield "metrics of its Credit are declared, and are numbers, per row or per token", lambda: _credits(plugin)


def check_declared(plugin: Plugin, names: Iterable[str], how: str) -> None:
    """Assert that `metrics` of the plugin, or of one inside it, declares every name."""
    known = [metric.name for each in with_nested(plugin) for metric in each.metrics]
    missing = [name for name in names if not any(pattern(own).fullmatch(name) for own in known)]
    assert not missing, (
        f"{how} {', '.join(map(repr, missing))}, which it does not declare. For tables and dashboards "
        f'write metrics = (Metric("{missing[0]}", "unit", "what it measures"),)'
    )


def check_finite(numbers: Mapping[str, Any], how: str) -> None:
    """Assert that each value is a finite number."""
    for name, x in numbers.items():
        number = isinstance(x, int | float) and not isinstance(x, bool)
        assert number, f"{how} {name!r}, which must be a number, got {type(x).__name__}"
        assert math.isfinite(x), f"{how} {name!r}, which must be finite, got {x}. Leave out missing values"


def _are_named(plugin: Plugin, axis: str) -> None:
    own: Any = plugin.metrics
    right = isinstance(own, tuple) and all(isinstance(metric, Metric) for metric in own)
    assert right, f"metrics must be a tuple of Metric, got {own!r}. Write metrics = (Metric(...),), with the comma"
    area = AXES[axis].axis.metric_prefix.partition("/")[0]
    settings = {setting.name for setting in fields(plugin)}
    names = [under(AXES[axis].axis.metric_prefix, metric) for metric in own]
    for metric in own:
        title = f"the metric {metric.name!r}"
        assert NAME.fullmatch(metric.name), f"{title} must be words separated by /, such as clip_frac/high"
        inside = area and metric.name.partition("/")[0] == area
        assert not inside, f"{title} begins with its axis' prefix, which is added to it. Leave {area}/ out"
        assert names.count(under(AXES[axis].axis.metric_prefix, metric)) == 1, f"{title} is declared more than once"
        assert metric.meaning, f"{title} does not say what it measures"
        known = metric.setting is None or metric.setting.partition("=")[0] in settings
        assert known, f"{title} names an unknown setting {metric.setting!r}. Choose from {', '.join(settings)}"
        low, high = metric.healthy or (None, None)
        assert low is None or high is None or low <= high, (
            f"{title}: healthy must be (lowest, highest), got {metric.healthy}"
        )


def _reports(plugin: Plugin, history: Statistics) -> None:
    own = duplicate(plugin)
    for statistics in ({}, *history):
        try:
            observe(own, statistics) if statistics else None
        except KeyError as error:
            raise SkipTest(f"skipped: it reads the statistic {error}") from None
        numbers = own.report()
        assert isinstance(numbers, Mapping), f"report() must return a dict of numbers, got {type(numbers).__name__}"
        check_finite(numbers, "report() returns")
        check_declared(plugin, numbers, "report() returns")


def _returns(plugin: PolicyLoss) -> None:
    t = ordinary_tensors()
    outputs = _or_skip(lambda: OUTPUTS["policy_loss"](plugin, t))
    found = {name.removeprefix("metric "): x for name, x in outputs.items() if name.startswith("metric ")}
    check_declared(plugin, found, "it returns the metrics")
    for name, x in found.items():
        assert bool((x * t["mask"]).isfinite().all()), f"the metric {name!r} is not finite on the mask"


Answer = TypeVar("Answer")


def _or_skip(call: Callable[[], Answer]) -> Answer:
    try:
        return call()
    except Exception as error:
        raise SkipTest(f"skipped: it fails on ordinary input. {error}") from None


def _credits(plugin: AdvantageEstimator) -> None:
    t = ordinary_tensors()
    metrics = _or_skip(lambda: Credit.of(plugin(as_scored(t))).metrics)
    check_declared(plugin, metrics, "its Credit has the metrics")
    rows, due = t["mask"].shape[0], (t["mask"].shape[:1], t["mask"].shape)
    for name, x in metrics.items():
        if not isinstance(x, Tensor) or not x.dim():
            check_finite({name: float(x)}, "its Credit has")
            continue
        assert x.shape in due, (
            f"the metric {name!r} must be a number or have shape ({rows},) or (N, T), got {tuple(x.shape)}"
        )
        assert bool(x.double().isfinite().any()), f"the metric {name!r} has no finite number on ordinary input"
