"""Metrics: every number that is logged, and what a value outside of its healthy range means."""

from __future__ import annotations

from collections.abc import Iterator

from generators.markdown import code, own_host, own_plugins, table
from hf_rlhf.axes import AXES
from hf_rlhf.contract.metric import Metric
from hf_rlhf.metrics import (
    CORE,
    EVAL,
    EVALUATION,
    OFFLINE,
    OFFLINE_EVALUATION,
    SECTIONS,
    CoreMetric,
    declared_by,
)
from hf_rlhf.metrics.catalog import CRITIC, KL, POLICY, REWARDS, ROLLOUTS
from hf_rlhf.metrics.names import under
from hf_rlhf.registry.host import OWN_PACKAGE, Host

HEADER = ("metric", "unit", "meaning", "healthy", "when")
READING = ("metric", "what it means", "healthy", "what unhealthy looks like, and what people change")

AXES_OF = {
    REWARDS: ("rewards", "advantages"),
    KL: ("kl",),
    POLICY: ("policy_loss", "loss_terms", "optimizer"),
    CRITIC: ("critic",),
    ROLLOUTS: ("sampler", "rollout", "rollout_correction", "filters"),
}
"""Axes whose plugins' metrics are listed in a section of the core's."""


def logged(section: str) -> Iterator[str]:
    """List the metrics of a section: the core's, then the plugins'."""
    (title,) = (name for name in SECTIONS if name.startswith(section))
    rows = [_row(code(m.name), m, m.condition.words) for m in CORE if m.section == title]
    yield table(HEADER, rows + [row for axis in AXES_OF.get(title, ()) for row in _plugin_rows(own_host(), axis)])


def evaluation() -> Iterator[str]:
    yield table(HEADER, [_row(code(EVAL + m.name), m, m.condition.words) for m in EVALUATION])


def offline() -> Iterator[str]:
    """Return the metrics of recipes without rollouts."""
    rows = [_row(code(m.name), m, "") for m in OFFLINE]
    rows += [_row(code(EVAL + m.name), m, "") for m in OFFLINE_EVALUATION]
    yield table(HEADER, rows + _plugin_rows(own_host(), "trainer"))


def reading() -> Iterator[str]:
    """Every metric with what an unhealthy value means and what people change."""
    for section in SECTIONS:
        rows = [_reading_row(metric.name, metric) for metric in CORE if metric.section == section]
        yield f"## {section}\n\n{table(READING, rows)}"
    yield "## Held-out prompts\n\n" + table(
        READING, [_reading_row(EVAL + metric.name, metric) for metric in EVALUATION]
    )
    yield "## Plugins\n\nWhat the plugins of this package log of their own; others declare theirs in the same way."
    host = own_host()
    rows = [
        [code(f"{offer.axis}.{offer.name}"), *_reading_row(name, metric)]
        for offer in own_plugins(host)
        for name, metric in declared_by(host.get(offer.axis, f"{OWN_PACKAGE}/{offer.name}"), offer.axis).items()
    ]
    yield table(("plugin", *READING), rows)


def _reading_row(name: str, metric: Metric) -> list[str]:
    low, high = metric.healthy or (None, None)
    bounds = [f"{word} {bound:g}" for word, bound in (("at least", low), ("at most", high)) if bound is not None]
    return [code(name), f"{metric.meaning} ({metric.unit})", ", ".join(bounds), metric.unhealthy]


def _plugin_rows(host: Host, axis: str) -> list[list[str]]:
    """One row per name on an axis, with the plugins that log it."""
    found: dict[tuple[str, str], tuple[Metric, list[str]]] = {}
    for offer in own_plugins(host, axis):
        for metric in host.get(axis, f"{OWN_PACKAGE}/{offer.name}").metrics:
            name = under(AXES[axis].axis.metric_prefix, metric)
            shown = name.replace("<label>", offer.name) if axis != "rewards" else name
            found.setdefault((shown, metric.meaning), (metric, []))[1].append(offer.name)
    return [_row(f"`{name}`", m, f"`{axis}`: {', '.join(whose)}") for (name, _), (m, whose) in found.items()]


def _row(name: str, metric: Metric | CoreMetric, given: str) -> list[str]:
    when = {"end": "last entry", "evaluation": "evaluation"}.get(metric.when, metric.when)
    if metric.setting:
        given = f"{given}, with `{metric.setting}`" if given else f"with `{metric.setting}`"
    where = ", ".join(filter(None, (when, given, "not in every run" if metric.optional and not given else "")))
    return [name, metric.unit, metric.meaning, _range(metric), where]


def _range(metric: Metric) -> str:
    low, high = metric.healthy or (None, None)
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""
