"""Every metric of a run: the core's, and those that its plugins declare, under the names by which they are logged."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING

from hf_rlhf.axes import AXES
from hf_rlhf.config.algorithm import places
from hf_rlhf.config.references import drifts
from hf_rlhf.contract.metric import Metric, pattern
from hf_rlhf.metrics.aliases import aliased, entropy_is_exact, named
from hf_rlhf.metrics.catalog import EVAL, SECTIONS, CoreMetric
from hf_rlhf.metrics.catalog_evaluation import EVALUATION
from hf_rlhf.metrics.catalog_offline import OFFLINE, OFFLINE_EVALUATION, metrics_of_trainer
from hf_rlhf.metrics.catalog_rollout import RUNNING
from hf_rlhf.metrics.catalog_training import LEARNING
from hf_rlhf.metrics.names import Named, is_logged, under

if TYPE_CHECKING:
    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.config.sections import Logging
    from hf_rlhf.contract.base import Plugin

__all__ = [
    "CORE",
    "EVAL",
    "EVALUATION",
    "OFFLINE",
    "OFFLINE_EVALUATION",
    "SECTIONS",
    "CoreMetric",
    "Named",
    "aliased",
    "entropy_is_exact",
    "metrics_of",
    "metrics_of_trainer",
    "pattern",
]

CORE: tuple[CoreMetric, ...] = (*LEARNING, *RUNNING)
"""Metrics of training, whatever the plugins, if their `given` holds."""


def metrics_of(algorithm: Algorithm, logging: Logging | None = None) -> list[Named]:
    """Return every metric that a run of `algorithm` may log, under a library's names too with `logging.metric_aliases`.

    All but the `optional` ones appear in the log.
    """
    found = [
        Named(name, metric, metric.section)
        for metric in CORE
        if metric.condition.holds(algorithm)
        for name in _expanded(metric.name, algorithm)
    ]
    found += [
        Named(f"{EVAL}{name}", metric, metric.section)
        for metric in EVALUATION
        if metric.condition.holds(algorithm)
        for name in _expanded(metric.name, algorithm)
    ]
    for area, axis, plugin in places(algorithm):
        found += [
            Named(under(area, metric), metric, axis, f"{axis}.{plugin.name}")
            for metric in plugin.metrics
            if is_logged(metric, plugin)
        ]
    if logging is not None:
        found += named(found, algorithm, logging)
    return found


def declared_by(plugin: type[Plugin], axis: str) -> dict[str, Metric]:
    """Return the metrics that a plugin class declares, by full name with the label left open."""
    return {under(AXES[axis].axis.metric_prefix, metric): metric for metric in plugin.metrics}


def _expanded(name: str, algorithm: Algorithm) -> Iterator[str]:
    """Yield the names of a core metric in an algorithm: one per reward source, KL, term or filter."""
    if "<other>" in name:
        paid = [label for label, source in zip(algorithm.labels(), algorithm.rewards, strict=True) if source.weight]
        for label, other in combinations(paid, 2):
            yield name.replace("<label>", label).replace("<other>", other)
    elif "answered_frac" in name:
        sources = zip(algorithm.labels(), algorithm.rewards, strict=True)
        yield from (name.replace("<label>", label) for label, source in sources if source.verifier)
    elif "<label>" in name:
        yield from (name.replace("<label>", label) for label in algorithm.labels())
    elif "<kl>/rollout/" in name:
        yield from (name.replace("<kl>", title) for title in drifts(algorithm))
    elif "<kl>" in name:
        for title, kl in algorithm.titled("kl"):
            if _has(name, kl):
                yield name.replace("<kl>", title).replace("<estimator>", kl.estimator.name)
    elif "<term>" in name:
        yield from (name.replace("<term>", title) for title, _ in algorithm.titled("loss_terms"))
    elif "<filter>" in name:
        yield from (name.replace("<filter>", title) for title, _ in algorithm.titled("filters"))
    else:
        yield name


def _has(name: str, kl: object) -> bool:
    """Return whether this KL logs the metric, which another one may."""
    return {
        "kl/<kl>/loss": "loss" in getattr(kl, "places", ()),
        "kl/<kl>/beta": hasattr(kl, "controller"),
        "kl/<kl>/clamp_frac": getattr(kl, "clamp", None) is not None,
    }.get(name, True)
