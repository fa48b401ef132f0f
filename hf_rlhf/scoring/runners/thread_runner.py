"""Runner in threads. A thread that exceeds its time limit cannot be stopped: it is abandoned and replaced."""

from __future__ import annotations

import queue
import threading

from hf_rlhf.contract.reward_source import RewardSource
from hf_rlhf.runtime.worker_pool import READY, Events
from hf_rlhf.scoring.runners.process_runner import RewardPool
from hf_rlhf.scoring.runners.reward_call import RewardCall, call, failed


class Thread:
    """Worker thread that calls the source on the units it is sent."""

    def __init__(self, events: Events, label: str, source: RewardSource) -> None:
        self._events, self._label, self._source = events, label, source
        self._inbox: queue.SimpleQueue[RewardCall | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=f"hf_rlhf-reward-{label}", daemon=True).start()
        events.put((self, READY))

    def send(self, state: bytes, units: list[RewardCall]) -> None:
        """Send units. The source is shared, so its state need not be sent."""
        for unit in units:
            unit.seed = None  # the global generators are shared by all threads
            self._inbox.put(unit)

    def stop(self, idle: bool = False) -> None:
        """Stop after the current call, whose result is ignored."""
        self._inbox.put(None)

    def _work(self) -> None:
        while (unit := self._inbox.get()) is not None:
            try:
                outcome = call(self._label, self._source, unit)
            except BaseException as error:
                outcome = failed(error)
            self._events.put((self, outcome))


def threads(label: str, source: RewardSource, requests: int = 1) -> RewardPool:
    """Create a pool of threads."""
    return RewardPool(label, source, lambda events: Thread(events, label, source), requests, shared=True)
