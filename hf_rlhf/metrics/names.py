"""Full names of metrics: as logged, and as Trainer's callback rewrites them for Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf.contract.metric import Metric
from hf_rlhf.metrics.catalog import EVAL


@dataclass(frozen=True)
class Named:
    """A metric of one algorithm, by the full name under which it is logged."""

    name: str
    """Parts known only during the run stay in angle brackets: `eval_pass@<k>`, a reward function's own names."""
    metric: Metric
    section: str
    """A section of SECTIONS for a metric of the core, otherwise the plugin's axis."""
    plugin: str = ""
    """`axis.name` of the plugin that declares it; empty for the core's."""


def under(area: str, metric: Metric) -> str:
    """Return the full name of a plugin's metric: below its axis's prefix (trainers have none), after `eval_` if it belongs to
    an evaluation."""
    name = f"{area}/{metric.name}" if area else metric.name
    return f"{EVAL}{name}" if metric.when == "evaluation" else name


def is_logged(metric: Metric, plugin: object) -> bool:
    """Return whether the plugin's settings enable this metric."""
    if metric.setting is None:
        return True
    name, given, value = metric.setting.partition("=")
    found = getattr(plugin, name, None)
    return str(found) == value if given else found not in (None, False, 0, "none")


STEP = "train/global_step"
"""The optimizer step, which Trainer's callback logs with every entry: the x-axis of every metric."""
TABLE = "samples/completions"
"""The table of completions."""
ONCE = frozenset({"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"})
"""Written only to the run's summary, under these names."""


def tracked(name: str) -> str:
    """Map `reward/total/mean` to `train/reward/total/mean`, and `eval_accuracy` to `eval/accuracy`."""
    if name in ONCE:
        return name
    return f"eval/{name.removeprefix(EVAL)}" if name.startswith(EVAL) else f"train/{name}"


def is_open(name: str) -> bool:
    """Return whether a part of a name is known only during the run: `eval_pass@<k>`."""
    return "<" in name


def globbed(name: str) -> str:
    """Return an open name in the form of `define_metric`: a star in place of the open part and the rest."""
    return f"{name.partition('<')[0]}*" if is_open(name) else name
