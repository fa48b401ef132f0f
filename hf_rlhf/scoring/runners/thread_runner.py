"""In threads. One that takes too long cannot be stopped: it is left behind and replaced."""

from __future__ import annotations

import queue
import threading

from hf_rlhf.contract.reward_source import RewardSource
from hf_rlhf.scoring.runners.reward_call import RewardCall, call, failed
from hf_rlhf.scoring.runners.worker_pool import READY, Events, WorkerPool, count_of


class Thread:
    """A thread that calls the source on what it is sent."""

    def __init__(self, events: Events, label: str, source: RewardSource) -> None:
        self._events, self._label, self._source = events, label, source
        self._inbox: queue.SimpleQueue[RewardCall | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=f"hf_rlhf-reward-{label}", daemon=True).start()
        events.put((self, READY))

    def send(self, state: bytes, units: list[RewardCall]) -> None:
        """The source is shared: its state is where it is."""
        for unit in units:
            unit.seed = None  # the global generators are not a thread's own
            self._inbox.put(unit)

    def stop(self, idle: bool = False) -> None:
        """It ends after what it does now, whose outcome nobody reads."""
        self._inbox.put(None)

    def _work(self) -> None:
        while (unit := self._inbox.get()) is not None:
            try:
                outcome = call(self._label, self._source, unit)
            except BaseException as error:
                outcome = failed(error)
            self._events.put((self, outcome))


def threads(label: str, source: RewardSource) -> WorkerPool:
    """A pool of threads."""
    return WorkerPool(label, source, lambda events: Thread(events, label, source), count=count_of(source), shared=True)
