"""Runner in the caller's thread, call after call, with time limits if the thread can be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hf_rlhf.contract.reward_source import RewardSource
from hf_rlhf.runtime.worker_pool import never
from hf_rlhf.scoring.runners.isolation import isolated
from hf_rlhf.scoring.runners.reward_call import CallResult, RewardCall, TimeUp, call, cancelled, late, logged

REPEAT_S = 1.0
"""Seconds before a call that swallowed the interruption is interrupted again."""


class Inline:
    """Runner that calls a source directly."""

    inline, shared = True, False

    def __init__(self, label: str, source: RewardSource) -> None:
        self.label, self.source = label, source

    def run(self, units: list[RewardCall], is_cancelled: Callable[[], bool] = never) -> list[CallResult]:
        """Return one result per unit. Only Python's main thread can interrupt a call, on systems with interval timers."""
        with isolated():
            return self._run(units, is_cancelled)

    def _run(self, units: list[RewardCall], is_cancelled: Callable[[], bool]) -> list[CallResult]:
        seconds = self.source.timeout
        if seconds is None or threading.current_thread() is not threading.main_thread() or not interruptible():
            return [self._logged(unit, is_cancelled, None) for unit in units]
        with alarms_put_back():
            return [self._logged(unit, is_cancelled, seconds) for unit in units]

    def _logged(self, unit: RewardCall, is_cancelled: Callable[[], bool], seconds: float | None) -> CallResult:
        if is_cancelled():
            return cancelled()
        outcome = call(self.label, self.source, unit) if seconds is None else self._timed(unit, seconds)
        return logged(self.label, self.source, outcome)

    def _timed(self, unit: RewardCall, seconds: float) -> CallResult:
        signal.signal(signal.SIGALRM, _raise)  # for each call: an earlier one may have set its own
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_S)
            try:
                return call(self.label, self.source, unit)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeUp:
            return late(seconds)

    def wait(self) -> None:
        """Do nothing: there are no workers."""

    def close(self) -> None:
        """Do nothing: there are no workers."""


def interruptible() -> bool:
    """Return True if this system has interval timers."""
    return hasattr(signal, "setitimer")


def _raise(number: int, frame: FrameType | None) -> None:
    raise TimeUp


@contextmanager
def alarms_put_back() -> Iterator[None]:
    """Restore the SIGALRM handler and timer afterwards."""
    before, left = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left[0]:
            signal.setitimer(signal.ITIMER_REAL, *left)
