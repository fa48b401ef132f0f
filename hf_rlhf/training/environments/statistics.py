"""Metrics of episodes."""

from __future__ import annotations

from hf_rlhf.batch import Rollouts
from hf_rlhf.metrics.aggregator import MetricAggregator


def report_episodes(meters: MetricAggregator, rollouts: Rollouts, waited: float, overridden: int) -> None:
    """Log turns, tokens and ends of the episodes that environments played.

    `waited`: seconds of the engine; `overridden`: number of sampling arguments in agents' requests.
    """
    columns, ids = rollouts.columns, rollouts.episode_ids
    rows = [i for i, name in enumerate(columns["episode/environment"]) if name is not None]
    turns, ends = columns["episode/turn_ends"], columns["episode/end"]
    episodes = len({ids[i] for i in rows})
    for name, numbers in (
        ("environment/turns/mean", [len(turns[i]) for i in rows]),
        ("environment/forks/mean", [len(rollouts.forks[i]) for i in rows]),
        ("environment/tokens/mean", [rollouts.masks[i].count(0) if turns[i] else 0 for i in rows]),
        ("environment/over_frac", {ids[i] for i in rows if ends[i] == "over"}),
    ):
        meters.add(name, float(len(numbers) if isinstance(numbers, set) else sum(numbers)), episodes)
    for kind in ("error", "timeout"):
        meters.count(f"health/environment_{kind}", len({ids[i] for i in rows if ends[i] == kind}))
    meters.count("environment/overridden", overridden)
    meters.put("time/environment_s", waited)
