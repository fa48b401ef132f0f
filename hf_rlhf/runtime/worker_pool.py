"""A pool of workers that loses one unit to a call that hangs or dies, and replaces the worker. Needs no torch.

Rewards (a unit is a row), tools (a call) and environments (an episode) run in it.

pebble and loky do not survive these faults (`tests/processes/test_worker_pool_alternatives.py` shows each):

- pebble kills a worker at its time limit and leaves the processes that the call has started;
- a call in pebble continues past its time limit when the run itself is killed;
- pebble's spawned workers import the caller's main script again, which fails unless the script is guarded;
- loky fails every row in flight, and all later ones, when one process dies, and has no time limit for a call.

Neither has threads that can be abandoned, or Ray actors, behind the same interface.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from hf_rlhf.runtime.errors import UserError

START_S = 120.0
"""Seconds for a worker to start."""
STARTS = 3
"""Number of consecutive failed starts after which the pool gives up."""


class WorkerError(UserError, RuntimeError):
    """Error for workers that cannot be used."""

    code = 1


class WorkerStartError(WorkerError):
    """Error for workers that do not start."""

    code = 2


@dataclass(frozen=True)
class Lost:
    """Result of a unit that was not run to its end."""

    kind: Literal["error", "timeout", "cancelled"]
    """error: its worker died; timeout: it took too long; cancelled: nobody waits for it, and it was not begun."""
    reason: str = ""


@dataclass(frozen=True)
class WorkerReady:
    """Event: a worker is ready for units."""


READY = WorkerReady()
"""Reported when a worker has started, and by a process also when it has read its units: their time starts then."""


@dataclass(frozen=True)
class WorkerDied:
    """Event: a worker has died."""

    reason: str


@dataclass(frozen=True)
class WorkerAsks:
    """Event: the unit of a worker asks its listener something, and waits for `Worker.reply`."""

    question: Any


@dataclass(frozen=True)
class PoolClosed:
    """Event: the pool is closed."""


CLOSED = PoolClosed()
Events = queue.SimpleQueue[tuple[Any, Any]]
"""Queue of (worker, event): READY, then a result per unit, in the order in which the worker got them."""


class Worker(Protocol):
    """Protocol of workers, which run units and report to the pool's `Events`."""

    def send(self, state: bytes, units: list[Any]) -> None:
        """Send units, preceded by a pickled state. Called only when the worker has none left."""

    def stop(self, idle: bool = False) -> None:
        """Kill the worker with its children, if possible; an idle one may close what it runs first."""


class Listener(Protocol):
    """Hears of the one unit of a `run`, in any thread; it must not block."""

    def started(self, worker: Any) -> None:
        """Note that a worker has begun the unit."""

    def asked(self, worker: Any, question: Any) -> None:
        """Note a question of the unit, to be answered by `worker.reply`, also later."""


def never() -> bool:
    """Return False: nobody cancels."""
    return False


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False)
class Batch:
    """Units of one `run`, and their results so far."""

    units: list[Any]
    state: bytes
    """Pickled state of what runs them."""
    is_cancelled: Callable[[], bool]
    listener: Listener | None
    todo: deque[int] = field(init=False)
    """Units that no worker has."""
    found: dict[int, Any] = field(default_factory=dict)
    error: WorkerError | None = None

    def __post_init__(self) -> None:
        self.todo = deque(range(len(self.units)))

    @property
    def is_done(self) -> bool:
        """Return True if every unit has a result, or the run has failed."""
        return self.error is not None or len(self.found) == len(self.units)


@dataclass
class WorkerState:
    """State of a worker in the pool."""

    ready: bool = False
    since: float = field(default_factory=time.monotonic)
    """Time of its start, or of the start of its first unit."""
    units: deque[int] = field(default_factory=deque)
    batch: Batch | None = None
    """Batch of its units."""


class WorkerPool:
    """Workers created by `start(events)`, each with at most `chunk` units at a time.

    Threads may call `run` at the same time: one of them handles the events of all until its own units are done. `title` names
    whose workers they are in errors, `kind` what they are, `advice` what to do about a unit that cannot be sent.
    """

    _error: ClassVar[type[WorkerError]] = WorkerError
    _start_error: ClassVar[type[WorkerError]] = WorkerStartError

    def __init__(
        self,
        title: str,
        start: Callable[[Events], Worker],
        *,
        count: int,
        chunk: int = 1,
        timeout: float | None = None,
        kind: str = "processes",
        advice: str = "",
    ) -> None:
        self.title, self.timeout, self.kind, self.advice = title, timeout, kind, advice
        self._start, self._chunk = start, chunk
        self._events: Events = queue.SimpleQueue()
        self._lock, self._failed_starts, self._closed = threading.Lock(), 0, False
        self._workers: dict[Any, WorkerState] = {}
        self._batches: deque[Batch] = deque()
        self._turn, self._led = threading.Condition(), False
        try:
            for _ in range(count):
                self._add()
        except BaseException:
            self.close()
            raise

    def run(
        self,
        units: list[Any],
        is_cancelled: Callable[[], bool] | None = None,
        *,
        state: bytes = b"",
        listener: Listener | None = None,
    ) -> list[Any]:
        """Return one result per unit, `Lost` or what a worker reported.

        Raises `WorkerError` if workers do not start, a unit cannot be sent, or the pool is closed meanwhile. With a `listener`
        there is one unit.
        """
        batch = Batch(units, state, is_cancelled or never, listener)
        with self._lock:
            self._batches.append(batch)
        self._wake()
        try:
            while self._has_turn(batch):
                try:
                    if self._events.empty():
                        self._feed()
                    self._take()
                finally:
                    with self._turn:
                        self._led = False
                        self._turn.notify_all()
        except BaseException:
            self._replace_busy(batch)
            raise
        finally:
            with self._lock:
                self._batches.remove(batch)
        if batch.error is not None:
            raise batch.error
        return [batch.found[i] for i in range(len(units))]

    def _has_turn(self, batch: Batch) -> bool:
        """Wait until this thread may handle events, and return True, or until the batch is done."""
        with self._turn:
            self._turn.wait_for(lambda: batch.is_done or not self._led)
            self._led = self._led or not batch.is_done
            return not batch.is_done

    def wait(self) -> None:
        """Wait until a worker is ready. Raises `WorkerError` if none starts, or the pool is closed meanwhile."""
        while not any(held.ready for _, held in self._known()):
            self._take()

    def close(self) -> None:
        """Stop all workers, and runs in other threads."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, {}
        self._events.put((None, CLOSED))
        for worker, held in workers.items():
            worker.stop(idle=held.ready and not held.units)

    def _add(self) -> None:
        if self._closed:
            return
        worker = self._start(self._events)
        with self._lock:
            if not self._closed:
                self._workers[worker] = WorkerState()
                return
        worker.stop()

    def _remove(self, worker: Any) -> WorkerState | None:
        with self._lock:
            return self._workers.pop(worker, None)

    def _known(self) -> list[tuple[Any, WorkerState]]:
        with self._lock:
            if self._closed:
                raise self._error(f"{self.title} was closed")
            return list(self._workers.items())

    def _feed(self) -> None:
        """Send units to idle workers, from each batch in turn."""
        workers = self._known()
        for worker, held in workers:
            batch = self._next() if held.ready and not held.units else None
            if batch is None:
                continue
            chunk = max(1, min(self._chunk, len(batch.units) // (4 * len(workers)), len(batch.todo)))
            held.units.extend(batch.todo.popleft() for _ in range(chunk))
            held.batch = batch
            try:
                worker.send(batch.state, [batch.units[i] for i in held.units])
                held.since = time.monotonic()
            except Exception as error:  # whatever pickle raises
                reason = f"cannot send a row to a process: {type(error).__name__}: {error}"
                batch.error = self._error(f"{self.title}: {reason}{self.advice}")
                batch.error.__cause__ = error
                held.units.clear()
                self._wake()

    def _wake(self) -> None:
        """Let the thread that waits for events look again at what there is to do."""
        self._events.put((None, READY))

    def _next(self) -> Batch | None:
        """Return the next batch with units that no worker has."""
        with self._lock:
            for _ in range(len(self._batches)):
                self._batches.rotate(-1)
                batch = self._batches[-1]
                if batch.todo and batch.is_cancelled():
                    batch.found |= dict.fromkeys(batch.todo, Lost("cancelled"))
                    batch.todo.clear()
                    self._wake()
                if batch.todo and batch.error is None:
                    return batch
        return None

    def _take(self) -> None:
        """Wait for the next event or timeout."""
        limits = {worker: self._until(held) for worker, held in self._known()}
        nearest = min(limits.values(), default=0.0)
        try:
            wait = None if nearest == float("inf") else max(0.0, nearest - time.monotonic())
            worker, event = self._events.get(timeout=wait)
        except queue.Empty:
            now = time.monotonic()
            for worker in [worker for worker, limit in limits.items() if limit <= now]:
                self._lose(worker, Lost("timeout", f"took over {self.timeout or START_S:g} s"))
            return
        self._handle(worker, event)

    def _handle(self, worker: Any, event: Any) -> None:
        held = self._workers.get(worker)
        if held is None:  # a late event of an abandoned worker
            return
        if isinstance(event, WorkerReady):
            held.ready, self._failed_starts, held.since = True, 0, time.monotonic()
            if held.units and held.batch is not None and held.batch.listener is not None:
                held.batch.listener.started(worker)
        elif isinstance(event, WorkerDied):
            self._lose(worker, Lost("error", event.reason))
        elif not held.units or held.batch is None:
            return
        elif isinstance(event, WorkerAsks):
            if held.batch.listener is not None:
                held.batch.listener.asked(worker, event.question)
        else:
            held.batch.found[held.units.popleft()] = event
            held.since = time.monotonic()

    def _until(self, held: WorkerState) -> float:
        if not held.ready:
            return held.since + START_S
        return held.since + self.timeout if held.units and self.timeout else float("inf")

    def _lose(self, worker: Any, outcome: Lost) -> None:
        """Stop a worker: its first unit gets this result, the others go to another worker."""
        held = self._remove(worker)
        worker.stop()
        if held is None:
            return
        if held.units and held.batch is not None:
            held.batch.found[held.units.popleft()] = outcome
            held.batch.todo.extendleft(reversed(held.units))
        self._add()
        if not held.ready:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                reason = outcome.reason if outcome.kind == "error" else f"no response after {START_S:g} s"
                raise self._start_error(f"{self.title}: its workers ({self.kind}) do not start: {reason}")

    def _replace_busy(self, batch: Batch) -> None:
        with self._lock:
            busy = [worker for worker, held in self._workers.items() if held.units and held.batch is batch]
        for worker in busy:
            self._remove(worker)
            worker.stop()
            self._add()
