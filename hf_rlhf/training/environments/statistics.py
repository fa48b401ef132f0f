"""Metrics of episodes."""

from __future__ import annotations

from hf_rlhf.batch import Rollouts
from hf_rlhf.metrics.aggregator import MetricAggregator


def report_episodes(meters: MetricAggregator, rollouts: Rollouts, waited: float, overridden: int) -> None:
    """Log turns, tokens and ends of the episodes that environments played.

    `waited`: seconds of the engine; `overridden`: number of sampling arguments in agents' requests.
    """
    rows = [i for i, name in enumerate(rollouts.columns["episode/environment"]) if name is not None]
    turns, ends = rollouts.columns["episode/turn_ends"], rollouts.columns["episode/end"]
    own = [rollouts.masks[i].count(0) if turns[i] else 0 for i in rows]
    for name, numbers in (
        ("environment/turns/mean", [len(turns[i]) for i in rows]),
        ("environment/tokens/mean", own),
        ("environment/over_frac", [ends[i] == "over" for i in rows]),
    ):
        meters.add(name, float(sum(numbers)), len(rows))
    for kind in ("error", "timeout"):
        meters.count(f"health/environment_{kind}", sum(ends[i] == kind for i in rows))
    meters.count("environment/overridden", overridden)
    meters.put("time/environment_s", waited)
