"""Declaration of a metric: name, unit, meaning and healthy range."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

When = Literal["step", "rollout", "evaluation", "end"]
"""When a metric is measured: every optimizer step, rollout or evaluation, or at the end of training."""
Summary = Literal["last", "min", "max", "mean"]


@dataclass(frozen=True)
class Metric:
    """Declaration of a logged number.

    A plugin declares its own in `metrics`, with names below the prefix of its axis (`Axis.metric_prefix`): the metric
    `entropy_coef` of the loss term `mine` is logged as `plugin/mine/entropy_coef`. Tables, dashboards and the summary of a
    run are made from these declarations.
    """

    name: str
    """`<what>/<stat>`; of a core metric `<area>/<what>/<stat>`. A part in angle brackets stands for any text without `/`."""
    unit: str
    """Unit, such as nats per token, share of rows, seconds."""
    meaning: str
    """Meaning, as one phrase."""
    healthy: tuple[float | None, float | None] | None = None
    """Lowest and highest healthy value; None: no bound."""
    unhealthy: str = ""
    """Meaning of a value outside `healthy`, and what to change."""
    when: When = "rollout"
    """When it is measured."""
    setting: str | None = None
    """Logged only if this setting of the plugin is set (not None, False, 0 or `none`), or has the value of `name=value`."""
    optional: bool = False
    """True if a run may never log it."""
    summary: Summary = "last"
    """Statistic that the summary of a run keeps besides the last value."""


def pattern(name: str) -> re.Pattern[str]:
    """Return the pattern of a declared name; a part in angle brackets is any text without `/`."""
    parts = re.split(r"(<\w+>)", name)
    return re.compile("".join("[^/]+" if part.startswith("<") else re.escape(part) for part in parts))
