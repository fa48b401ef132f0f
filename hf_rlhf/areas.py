"""Where the metrics of each axis stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_rlhf.algorithm import Algorithm
    from hf_rlhf.plugin import Plugin

AREAS: dict[str, str] = {
    "rollout": "rollout",
    "rewards": "reward/<label>",
    "kl": "kl/<label>",
    "kl_estimator": "kl_estimator/<label>",
    "kl_controller": "kl_controller/<label>",
    "advantages": "advantage",
    "baseline": "baseline/<label>",
    "critic": "value",
    "policy_loss": "policy",
    "rollout_correction": "rollout",
    "reference": "reference",
    "optimizer": "optimizer",
    "aggregation": "aggregation",
    "loss_terms": "plugin/<label>",
    "filters": "filter/<label>",
    "trainer": "",
}
"""Axis -> what stands before the names of its plugins' own metrics.

`<label>` is the `label` of a reward source, otherwise the plugin's name; the second of a kind is `<name>_2`. A trainer's
metrics have the names that its library logs.
"""


def titles(axis: str, plugins: Sequence[Plugin]) -> list[str]:
    """What stands for `<label>` of each of the plugins of one axis, in their order."""
    found: list[str] = []
    for plugin in plugins:
        label: str = (getattr(plugin, "label", None) if axis == "rewards" else None) or plugin.name
        numbered = (f"{label}_{n}" for n in count(2))
        found.append(label if label not in found else next(title for title in numbered if title not in found))
    return found


def places(algorithm: Algorithm) -> Iterator[tuple[str, str, Plugin]]:
    """(what stands before the names of its own metrics, axis, plugin) of every plugin of an algorithm, nested ones included;
    those of a list have the titles of `Algorithm.titled`."""
    from hf_rlhf.axes import AXES, LISTS, axis_of

    own: dict[str, list[Plugin]] = {axis: list(getattr(algorithm, axis)) if axis in LISTS else [] for axis in AXES}
    for path, plugin in algorithm.plugins():
        axis = axis_of(type(plugin))
        if axis not in LISTS or path.rpartition(".")[0] != axis:
            own[axis].append(plugin)
    for axis, plugins in own.items():
        for title, plugin in zip(titles(axis, plugins), plugins, strict=True):
            yield AREAS[axis].replace("<label>", title), axis, plugin
