"""The whole names of metrics: as they are logged, and as Trainer's callback rewrites them for Weights & Biases."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_rlhf.contract.metric import Metric
from hf_rlhf.metrics.catalog import EVAL


@dataclass(frozen=True)
class Named:
    """A metric of one algorithm, by the whole name under which it is logged."""

    name: str
    """Parts in angle brackets are left where only the run knows them: `eval_pass@<k>`, a reward function's own names."""
    metric: Metric
    section: str
    """A section of SECTIONS for a metric of the core, otherwise the plugin's axis."""
    plugin: str = ""
    """`axis.name` of the plugin that declares it; empty for the core's."""


def under(area: str, metric: Metric) -> str:
    """The whole name of a plugin's metric below the place of its axis; a trainer's stand below none, and those of an
    evaluation behind `eval_`."""
    name = f"{area}/{metric.name}" if area else metric.name
    return f"{EVAL}{name}" if metric.when == "evaluation" else name


def is_logged(metric: Metric, plugin: object) -> bool:
    """Whether the plugin's settings have it log this metric."""
    if metric.setting is None:
        return True
    name, given, value = metric.setting.partition("=")
    found = getattr(plugin, name, None)
    return str(found) == value if given else found not in (None, False, 0, "none")


def pattern(name: str) -> re.Pattern[str]:
    """What a declared name stands for; a part in angle brackets is any text without `/`."""
    parts = re.split(r"(<\w+>)", name)
    return re.compile("".join("[^/]+" if part.startswith("<") else re.escape(part) for part in parts))


STEP = "train/global_step"
"""What Trainer's callback logs with every entry: the optimizer step, the x-axis of every metric."""
TABLE = "samples/completions"
"""The table of completions."""
ONCE = frozenset({"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"})
"""Written into the run's summary alone, under these names."""


def tracked(name: str) -> str:
    """`reward/total/mean` -> `train/reward/total/mean`, `eval_accuracy` -> `eval/accuracy`."""
    if name in ONCE:
        return name
    return f"eval/{name.removeprefix(EVAL)}" if name.startswith(EVAL) else f"train/{name}"


def is_open(name: str) -> bool:
    """Whether a part of a name is known to the run alone: `eval_pass@<k>`."""
    return "<" in name


def globbed(name: str) -> str:
    """An open name as `define_metric` takes it: a star at its end, from the open part on."""
    return f"{name.partition('<')[0]}*" if is_open(name) else name
