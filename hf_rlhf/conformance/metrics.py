"""What every plugin promises of its metrics, as functions that raise AssertionError: they are declared, named and finite."""

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
from hf_rlhf.conformance.common import Claims, Statistics, duplicate, with_nested
from hf_rlhf.conformance.tensor_inputs import OUTPUTS, as_scored, ordinary
from hf_rlhf.contract.metric import Metric
from hf_rlhf.metrics.names import pattern, under

NAME = re.compile(r"[\w.@<>-]+(/[\w.@<>-]+)*")


def metric_checks(plugin: Plugin, axis: str, told: Statistics) -> Claims:
    """Of any plugin. `told` are the statistics of two rollouts."""
    yield "its metrics have names below its axis and say what they measure", lambda: _are_named(plugin, axis)
    yield "what it reports is declared and finite", lambda: _reports(plugin, told)
    if isinstance(plugin, PolicyLoss):
        yield "the metrics that it returns are declared and finite", lambda: _returns(plugin)
    if isinstance(plugin, AdvantageEstimator):
        yield "the metrics of its Credit are declared, a number or one per row or token", lambda: _credits(plugin)


def check_declared(plugin: Plugin, names: Iterable[str], how: str) -> None:
    """Asserts that `metrics` of the plugin, or of one inside it, declares every name."""
    known = [metric.name for each in with_nested(plugin) for metric in each.metrics]
    missing = [name for name in names if not any(pattern(own).fullmatch(name) for own in known)]
    assert not missing, (
        f"{how} {', '.join(map(repr, missing))}, which it does not declare, so that no table or dashboard knows what it is: "
        f'write metrics = (Metric("{missing[0]}", "unit", "what it measures"),) in its body'
    )


def check_finite(numbers: Mapping[str, Any], how: str) -> None:
    """Asserts that each is a finite number."""
    for name, x in numbers.items():
        number = isinstance(x, int | float) and not isinstance(x, bool)
        assert number, f"{how} {name!r} as a {type(x).__name__}; a number is due"
        assert math.isfinite(x), f"{how} {name!r} as {x}: leave out what is not there"


def _are_named(plugin: Plugin, axis: str) -> None:
    own: Any = plugin.metrics
    right = isinstance(own, tuple) and all(isinstance(metric, Metric) for metric in own)
    assert right, f"metrics is {own!r}; a tuple of Metric is due: metrics = (Metric(...),), with the comma"
    area = AXES[axis].axis.metric_prefix.partition("/")[0]
    settings = {setting.name for setting in fields(plugin)}
    names = [under(AXES[axis].axis.metric_prefix, metric) for metric in own]
    for metric in own:
        title = f"the metric {metric.name!r}"
        assert NAME.fullmatch(metric.name), f"{title} is no name: words with / between them, such as clip_frac/high"
        inside = area and metric.name.partition("/")[0] == area
        assert not inside, f"{title} begins with the place of its axis, which is put before it: leave {area}/ out"
        assert names.count(under(AXES[axis].axis.metric_prefix, metric)) == 1, f"{title} is declared more than once"
        assert metric.meaning, f"{title} does not say what it measures"
        known = metric.setting is None or metric.setting.partition("=")[0] in settings
        assert known, f"{title} is logged with the setting {metric.setting!r}, and there is none: {', '.join(settings)}"
        low, high = metric.healthy or (None, None)
        assert low is None or high is None or low <= high, (
            f"{title}: healthy is (lowest, highest), not {metric.healthy}"
        )


def _reports(plugin: Plugin, told: Statistics) -> None:
    own = duplicate(plugin)
    for statistics in ({}, *told):
        try:
            own.observe(statistics) if statistics else None
        except KeyError as error:
            raise SkipTest(f"not asked: it looks for the statistic {error}") from None
        numbers = own.report()
        assert isinstance(numbers, Mapping), f"report() gives a {type(numbers).__name__}; a dict of numbers is due"
        check_finite(numbers, "report() gives")
        check_declared(plugin, numbers, "report() gives")


def _returns(plugin: PolicyLoss) -> None:
    t = ordinary()
    outputs = _asked(lambda: OUTPUTS["policy_loss"](plugin, t))
    found = {name.removeprefix("metric "): x for name, x in outputs.items() if name.startswith("metric ")}
    check_declared(plugin, found, "it returns the metrics")
    for name, x in found.items():
        assert bool((x * t["mask"]).isfinite().all()), f"the metric {name!r} is not finite on the mask"


Answer = TypeVar("Answer")


def _asked(call: Callable[[], Answer]) -> Answer:
    try:
        return call()
    except Exception as error:
        raise SkipTest(f"not asked: on ordinary input it fails. {error}") from None


def _credits(plugin: AdvantageEstimator) -> None:
    t = ordinary()
    metrics = _asked(lambda: Credit.of(plugin(as_scored(t))).metrics)
    check_declared(plugin, metrics, "its Credit has the metrics")
    rows, due = t["mask"].shape[0], (t["mask"].shape[:1], t["mask"].shape)
    for name, x in metrics.items():
        if not isinstance(x, Tensor) or not x.dim():
            check_finite({name: float(x)}, "its Credit has")
            continue
        assert x.shape in due, f"the metric {name!r} is {tuple(x.shape)}; a number, ({rows},) or (N, T) is due"
        assert bool(x.double().isfinite().any()), f"the metric {name!r} has no finite number on ordinary input"
