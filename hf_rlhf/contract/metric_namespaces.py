"""Where the metrics of each axis stand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_rlhf.contract.base import Plugin

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
