"""What a metric is: its name, unit and meaning, and what a healthy value looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

When = Literal["step", "rollout", "evaluation", "end"]
"""What adds to a metric: every optimizer step, every rollout, every evaluation, or the end of training."""
Summary = Literal["last", "min", "max", "mean"]


@dataclass(frozen=True)
class Metric:
    """A number that is logged.

    A plugin declares its own in `metrics`, with names below the prefix of its axis (`Axis.metric_prefix`): the metric
    `entropy_coef` of the loss term `mine` is logged as `plugin/mine/entropy_coef`. Tables, dashboards and the summary of a
    run are made from these declarations.
    """

    name: str
    """`<what>/<stat>`; of a core metric `<area>/<what>/<stat>`. A part in angle brackets stands for any text without `/`."""
    unit: str
    """What one is of: nats per token, share of rows, seconds."""
    meaning: str
    """What is measured, as one phrase."""
    healthy: tuple[float | None, float | None] | None = None
    """Lowest and highest value that needs no look, None: no bound."""
    unhealthy: str = ""
    """What a value outside of `healthy` means, and what people change."""
    when: When = "rollout"
    """What adds to it."""
    setting: str | None = None
    """Logged only where this setting of the plugin is set: not None, False, 0 or `none`; written `name=value`, where it has
    this value."""
    optional: bool = False
    """True where a run may never log it."""
    summary: Summary = "last"
    """What the summary of a run keeps of it next to the last value."""
