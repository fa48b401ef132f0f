"""Where the metrics of each axis stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_rlhf.algorithm import Algorithm
    from hf_rlhf.plugin import Plugin

AREAS: dict[str, str] = {
    "rollout": "rollout",
    "rewards": "reward/<label>",
    "kl": "kl/<label>",
    "kl_estimator": "plugin/<label>",
    "kl_controller": "plugin/<label>",
    "advantages": "advantage",
    "baseline": "plugin/<label>",
    "critic": "value",
    "policy_loss": "policy",
    "rollout_correction": "rollout",
    "reference": "reference",
    "optimizer": "optimizer",
    "aggregation": "plugin/<label>",
    "loss_terms": "plugin/<label>",
    "filters": "filter/<label>",
    "trainer": "",
}
"""Axis -> what stands before the names of its plugins' own metrics.

`<label>` is the `label` of a reward source, otherwise the plugin's name; the second of a kind is `<name>_2`. A trainer's
metrics have the names that its library logs.
"""


def places(algorithm: Algorithm) -> Iterator[tuple[str, Plugin]]:
    """Every plugin of an algorithm, nested ones included, with what stands before the names of its own metrics."""
    from hf_rlhf.axes import AXES

    seen: dict[str, int] = {}
    for _, plugin in algorithm.plugins():
        axis = next(axis for axis, base in AXES.items() if isinstance(plugin, base))
        label = getattr(plugin, "label", None) or plugin.name
        area = AREAS[axis].replace("<label>", label)
        seen[area] = seen.get(area, 0) + 1
        again = seen[area] > 1 and "<label>" in AREAS[axis]
        yield f"{area}_{seen[area]}" if again else area, plugin
