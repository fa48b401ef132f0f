"""Runners of reward sources, selected by their setting `workers`.

    inline      in the caller's thread, source after source; the calls of an async source are awaited together
    threads     in threads, for sources that wait; a row that exceeds its time limit is abandoned, its thread replaced
    processes   in processes, each with a copy of the source: killed with their children at the time limit, and replaced
    ray         in actors on a Ray cluster, in the same way

Rows are split into units: one per row for a `rowwise` source, otherwise one for all rows. A runner returns one `CallResult`
per unit, in order, even if the unit failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Context
from hf_rlhf.contract.reward_source import prepare_all
from hf_rlhf.runtime.worker_pool import never
from hf_rlhf.scoring.runners.reward_call import CallResult, RewardCall

__all__ = ["CallResult", "RewardCall", "Runner", "never", "runner_for"]


class Runner(Protocol):
    """Protocol of runners, which run the units of one source."""

    inline: bool
    """True if it runs in the caller's thread; other runners may run in parallel."""
    shared: bool
    """True if calls of one source object may overlap, so that its logs cannot be attributed to a single call."""

    def run(self, units: list[RewardCall], is_cancelled: Callable[[], bool] = never) -> list[CallResult]:
        """Return one result per unit; those that are not called before it is cancelled have no answers.

        Raises `RewardError` if the source cannot be run at all. Unless `inline`, several threads may call it at a time.
        """

    def wait(self) -> None:
        """Wait until it can score. Raises `RewardError` if its workers do not start."""

    def close(self) -> None:
        """Stop all workers."""


def runner_for(label: str, source: RewardSource, context: Context | None, requests: int = 1) -> Runner:
    """Create the runner that the source's settings select for so many requests at a time, ready or starting up.

    With `context` it calls the source's `setup`; None means that the source was set up before.
    """
    if source.workers == "processes":
        from hf_rlhf.scoring.runners.process_runner import processes

        return processes(label, source, context, requests)
    if source.workers == "ray":
        from hf_rlhf.scoring.runners.ray_runner import actors

        return actors(label, source, context, requests)
    prepare_all(source)
    if context is not None:
        source.setup(context)
    if source.workers == "threads":
        from hf_rlhf.scoring.runners.thread_runner import threads

        return threads(label, source, requests)
    if source.asynchronous:
        from hf_rlhf.scoring.runners.asyncio_runner import Awaited

        return Awaited(label, source)
    from hf_rlhf.scoring.runners.inline_runner import Inline

    return Inline(label, source)
