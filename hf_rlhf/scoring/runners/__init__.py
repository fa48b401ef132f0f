"""Where a reward source runs: `workers` of its settings.

    inline      in the caller's thread, source after source; the calls of an async source are awaited together
    threads     in threads: for sources that wait; a row that takes too long is given up, its thread replaced
    processes   in processes, each with a copy of the source: killed with their children at the time limit, and replaced
    ray         in actors on a Ray cluster, in the same way

A `Job` is cut into units: one per row for a `rowwise` source, else one for all rows. A runner gives one `CallResult` per unit,
in order, whatever happened.
"""

from __future__ import annotations

from typing import Protocol

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Context
from hf_rlhf.scoring.runners.reward_call import CallResult, RewardCall

__all__ = ["Outcome", "Runner", "Unit", "runner_for"]


class Runner(Protocol):
    """Runs the units of one source."""

    inline: bool
    """It runs in the caller's thread; the others may run beside each other."""
    shared: bool
    """Several calls of one source object may be under way at once, so that what it logs is no single call's."""

    def run(self, units: list[RewardCall]) -> list[CallResult]:
        """One outcome per unit. Raises `RewardError` where the source cannot be run at all."""

    def close(self) -> None:
        """Stop what was started."""


def runner_for(label: str, source: RewardSource, context: Context | None) -> Runner:
    """The runner that the source's settings ask for; it is ready, or getting ready. `context`: for the source's `setup`,
    which then is done; None: it was set up before."""
    if source.workers == "processes":
        from hf_rlhf.scoring.runners.process_runner import processes

        return processes(label, source, context)
    if source.workers == "ray":
        from hf_rlhf.scoring.runners.ray_runner import actors

        return actors(label, source, context)
    if context is not None:
        source.setup(context)
    if source.workers == "threads":
        from hf_rlhf.scoring.runners.thread_runner import threads

        return threads(label, source)
    if source.asynchronous:
        from hf_rlhf.scoring.runners.asyncio_runner import Awaited

        return Awaited(label, source)
    from hf_rlhf.scoring.runners.inline_runner import Inline

    return Inline(label, source)
