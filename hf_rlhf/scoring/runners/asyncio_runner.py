"""Runner of async sources, whose calls are awaited together on an event loop in a separate thread."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as Late
from typing import Any

from hf_rlhf.contract.reward_source import RewardSource
from hf_rlhf.runtime.event_loop import run_loop
from hf_rlhf.runtime.worker_pool import never
from hf_rlhf.scoring.runners.reward_call import CallResult, RewardCall, answered, call, cancelled, failed, late

GRACE_S = 0.5
"""Seconds beyond the time limit before a loop blocked by a call is abandoned."""


class Awaited:
    """Runner that awaits the calls of one source, at most `num_workers` at a time if set."""

    inline, shared = False, True

    def __init__(self, label: str, source: RewardSource) -> None:
        self.label, self.source = label, source
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, units: list[RewardCall], is_cancelled: Callable[[], bool] = never) -> list[CallResult]:
        """Return one result per unit, in order.

        A call that blocks the thread instead of awaiting blocks all others, which are then abandoned with it.
        """
        if units and units[0].texts is not None:
            return [call(self.label, self.source, unit) for unit in units]
        limit = self.source.num_workers or len(units) or 1
        outcomes: list[CallResult | None] = [None] * len(units)
        done = asyncio.run_coroutine_threadsafe(self._all(units, outcomes, limit, is_cancelled), self._running_loop())
        seconds = self.source.timeout
        try:
            done.result(None if seconds is None else seconds * math.ceil(len(units) / limit) + GRACE_S)
        except CancelledError:  # another run has abandoned the loop
            pass
        except Late:
            done.cancel()
            self.close()
        held_up = late(seconds or 0.0, ", or another call blocked the event loop")
        return [held_up if outcome is None else outcome for outcome in outcomes]

    def wait(self) -> None:
        """Do nothing: the loop starts with the first call."""

    def close(self) -> None:
        """Stop the loop, after a call that blocks it."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=run_loop, args=(self._loop,), name=f"hf_rlhf-reward-{self.label}", daemon=True
                ).start()
            return self._loop

    async def _all(
        self,
        units: list[RewardCall],
        outcomes: list[CallResult | None],
        limit: int,
        is_cancelled: Callable[[], bool],
    ) -> None:
        places = asyncio.Semaphore(limit)

        async def one(i: int, unit: RewardCall) -> None:
            async with places:
                outcomes[i] = cancelled() if is_cancelled() else await self._one(unit)

        await asyncio.gather(*(one(i, unit) for i, unit in enumerate(units)))

    async def _one(self, unit: RewardCall) -> CallResult:
        try:
            async with asyncio.timeout(self.source.timeout) as limit:
                given: Any = await self.source(unit.rollouts)  # type: ignore[arg-type, misc]
            return answered(self.label, given, unit)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or _is_cancelled():
                raise
            if isinstance(error, TimeoutError) and limit.expired() and self.source.timeout is not None:
                return late(self.source.timeout)
            return failed(error)


def _is_cancelled() -> bool:
    """Return True if the task was cancelled; a source may also raise `CancelledError` itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
