"""Current activity of a run, by name, for whoever shows it: the code that does it says so, nobody guesses.

`with doing("rollout"):` costs a few list operations. Whoever shows it reads `current()` from any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

listeners: list[Callable[[], None]] = []
"""Called, in its thread, whenever an activity has begun."""
_now: list[Activity] = []


@dataclass(eq=False)
class Activity:
    """One activity that has begun."""

    name: str
    began: float
    """`time.monotonic()`."""
    thread: int
    whole: bool
    """True for one that consists of others, which says nothing while one of them goes on, in whatever thread."""
    progress: str = field(default="", init=False)
    """Share of it that is done, such as 3/32."""

    @property
    def seconds(self) -> float:
        """Return how long it has taken so far."""
        return time.monotonic() - self.began


@contextmanager
def doing(name: str, whole: bool = False) -> Iterator[None]:
    """Say inside, or in a decorated function, that this process does `name`. Activities nest; threads have their own."""
    activity = Activity(name, time.monotonic(), threading.get_ident(), whole)
    _now.append(activity)
    for listener in tuple(listeners):
        listener()
    try:
        yield
    finally:
        _now.remove(activity)


def progress(done: int, of: int) -> None:
    """Say how much of this thread's innermost activity is done."""
    own = threading.get_ident()
    if activity := next((activity for activity in reversed(_now) if activity.thread == own), None):
        activity.progress = f"{done}/{of}"


def current() -> tuple[Activity, ...]:
    """Return the innermost activity of each thread, the oldest first."""
    newest = {activity.thread: activity for activity in list(_now)}
    found = sorted(newest.values(), key=lambda activity: activity.began)
    return tuple([activity for activity in found if not activity.whole] or found)
