"""Play episodes in lockstep: the engine decodes whenever every live episode waits for it, rows in order.

Async environments share an event loop in a thread; each episode of a plain one has a thread of its own; with `workers:
processes` each has a process. The caller's thread decodes, so that its gradient mode, autocast and signals are the engine's.
Who waits for whom is kept under one lock, and the caller is woken once per turn. An episode that takes longer than its
environment's `timeout` between two turns is given up; its process is killed, a thread that hangs is abandoned, as are
episodes whose event loop is blocked.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hf_rlhf.contract.environment import Message, Over
from hf_rlhf.runtime.event_loop import run_loop
from hf_rlhf.runtime.plain_text import format_traceback
from hf_rlhf.runtime.worker_pool import Lost, WorkerError
from hf_rlhf.training.environments.endpoint import Endpoint
from hf_rlhf.training.environments.episode import EnvironmentFailure, Episode, Question, Reply
from hf_rlhf.training.environments.seats import Answered, Asked, Listener, Seat, SeatModel, options_of
from hf_rlhf.training.environments.workers import outcome_of

Decode = Callable[[list[Question]], list[Reply]]
QUIET = 3
"""Passes of the event loop without a question after which its episodes are taken to have asked all that they ask at once."""


class Lockstep:
    """Episodes of one rollout of this process. `decode` answers questions, in the order of their episodes."""

    def __init__(self, decode: Decode, dropped: Callable[[int], None] = lambda place: None):
        self._decode, self._dropped = decode, dropped
        self.changed = threading.Condition()
        self._live: dict[int, Seat] = {}
        self._left: list[int] = []
        """Places of episodes that have ended since the engine last decoded."""
        self._busy = 0
        self._settles = self._news = False
        self._heard = 0.0
        """When the event loop last gave a sign of life."""
        self._fatal: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.waited = 0.0
        """Seconds in which the engine waited for environments."""
        self.trace = ""
        """Traceback of the first environment that raised."""
        self.endpoint = Endpoint()

    def play(self, episodes: Sequence[Episode]) -> None:
        """Play all episodes to their ends. Raises what breaks an environment's contract, or its error with `on_error: raise`."""
        todo = deque(episodes)
        try:
            while (todo or self._live) and self._fatal is None:
                self._start(todo)
                self._wait()
                self._drop()
                if self._fatal is None:
                    self._answer()
            self._drop()
            if self._fatal is not None:
                raise self._fatal
        finally:
            self._close()

    def stop(self, error: BaseException) -> None:
        """End all episodes with an error, which `play` raises."""
        with self.changed:
            self._fatal = self._fatal or error
            self.changed.notify()

    def waits(self, seat: Seat) -> None:
        """Note a question of an episode, which has all of them once the event loop is quiet."""
        with self.changed:
            if not seat.in_loop:
                self._rest([seat])
                return
            self._news, self._heard = True, time.monotonic()
            if not self._settles and self._loop is not None:
                self._settles = True
                self._loop.call_soon(self._settle)

    def _settle(self, quiet: int = 0) -> None:
        with self.changed:
            quiet, self._news = (0 if self._news else quiet + 1), False
            self._settles = quiet < QUIET
            if not self._settles:
                self._rest([seat for seat in self._live.values() if seat.in_loop])
            elif self._loop is not None:
                self._loop.call_soon(self._settle, quiet)

    def _rest(self, seats: Sequence[Seat]) -> None:
        """Note that these episodes wait for the policy, if they have questions."""
        for seat in seats:
            if seat.asked and not seat.rests and not seat.ended:
                seat.rests = True
                self._is_idle()

    def recount(self) -> None:
        """Look again at when episodes are over time."""
        with self.changed:
            self.changed.notify()

    def _is_idle(self) -> None:
        self._busy, self._heard = self._busy - 1, time.monotonic()
        if self._busy == 0:
            self.changed.notify()

    def _start(self, todo: deque[Episode]) -> None:
        """Start episodes, in order, as many at a time as their environments take."""
        started, later = [], []
        for episode in todo:
            environment = episode.environment
            most = None if environment is None else environment.most_live
            if most is not None and sum(s.episode.environment is environment for s in self._live.values()) >= most:
                later.append(episode)
                continue
            seat = self._live[episode.place] = Seat(episode, self)
            if environment is None:
                seat.asked, seat.rests = (
                    [Asked(Question(episode=episode, prompt=episode.prompt), lambda message: None)],
                    True,
                )
            else:
                seat.in_loop = environment.asynchronous and not environment.plays_in_processes
                started.append(seat)
        todo.clear()
        todo.extend(later)
        with self.changed:
            self._busy += len(started)
        self._in_loop(self._begin, [(seat,) for seat in started if seat.in_loop])
        for seat in started:
            if seat.environment.plays_in_processes:
                seat.since = math.inf  # until its process begins
                threading.Thread(target=self._in_worker, args=(seat,), name=f"hf_rlhf-{seat.name}", daemon=True).start()
            elif not seat.in_loop:
                threading.Thread(target=self._in_thread, args=(seat,), name=f"hf_rlhf-{seat.name}", daemon=True).start()

    def _wait(self) -> None:
        """Wait until every live episode waits for the policy or has ended."""
        start = time.monotonic()
        self._watch()
        self.waited += time.monotonic() - start

    def _watch(self) -> None:
        """Return when the wait is over; give up episodes whose time is over."""
        with self.changed:
            while not self._is_over() and self._fatal is None:
                now = time.monotonic()
                working = [seat for seat in self._live.values() if not seat.rests]
                left = {seat: self._since(seat) + seat.environment.timeout - now for seat in working}
                overdue = [seat for seat, seconds in left.items() if seconds <= 0]
                self._rest(overdue)  # those with a question, if the event loop is blocked
                for seat in [seat for seat in overdue if not seat.rests]:
                    self._end(seat, "timeout", f"took over {seat.environment.timeout:g} s between two turns")
                    if seat.task is not None and self._loop is not None:
                        self._loop.call_soon_threadsafe(seat.task.cancel)
                    if seat.worker is not None:
                        seat.worker.stop()
                if not self._is_over():
                    self.changed.wait(min(max(0.0, min(left.values(), default=0.0)), threading.TIMEOUT_MAX))

    def _is_over(self) -> bool:
        """Return whether the wait is over."""
        return not self._busy

    def _since(self, seat: Seat) -> float:
        """Return when a seat's time began; those of the event loop wait for each other there."""
        return max(seat.since, self._heard) if seat.in_loop else seat.since

    def _drop(self) -> None:
        """Tell the engine which episodes have ended, while it does not decode."""
        with self.changed:
            left, self._left = self._left, []
        for place in left:
            self._dropped(place)

    def _answer(self) -> None:
        """Let the policy answer every question."""
        with self.changed:
            seats = [self._live[place] for place in sorted(self._live)]
            asked = self._in_order([(seat, each) for seat in seats for each in seat.asked])
        if not asked:
            return
        replies = self._decode([question for _, (question, _) in asked])
        answers: list[tuple[Seat, Answered, Message]] = []
        with self.changed:
            for (seat, (question, answered)), reply in zip(asked, replies, strict=True):
                if seat.ended:  # with another question while the engine decoded
                    continue
                seat.asked.pop(0)
                if seat.episode.environment is None:
                    seat.episode.reply = reply
                    self._leave(seat)
                else:
                    answers.append((seat, answered, seat.episode.answer(question, reply)))
            now, spoken = time.monotonic(), dict.fromkeys(seat for seat, *_ in answers)
            for seat in spoken:
                seat.rests, seat.since = False, now
            self._busy += len(spoken)
        for seat, answered, message in answers:
            if not seat.in_loop:
                answered(message)
        self._in_loop(
            lambda answered, message: answered(message),
            [(answered, message) for seat, answered, message in answers if seat.in_loop],
        )
        for seat in [seat for seat in spoken if seat.asked]:  # another one since
            self._in_loop(self.waits, [(seat,)]) if seat.in_loop else self.waits(seat)

    def _in_order(self, asked: list[tuple[Seat, Asked]]) -> list[tuple[Seat, Asked]]:
        """Sort questions so that those of a group that are asked at the same time are adjacent, in the order of its episodes."""
        groups: dict[int, int] = {}
        seen: Counter[Seat] = Counter()
        keys = []
        for seat, _ in asked:
            keys.append((groups.setdefault(seat.episode.group, len(groups)), seen[seat], seat.episode.place))
            seen[seat] += 1
        return [asked[i] for i in sorted(range(len(asked)), key=keys.__getitem__)]

    def _begin(self, seat: Seat) -> None:
        seat.task = asyncio.ensure_future(self._awaited(seat))

    async def _awaited(self, seat: Seat) -> None:
        """Play an async episode."""
        loop = asyncio.get_running_loop()

        async def ask(messages: Sequence[Message], **options: Any) -> Message:
            future: asyncio.Future[Message] = loop.create_future()
            seat.ask(messages, options_of(**options), partial(_resolve, future))
            return await future

        def wait(messages: Sequence[Message], **options: Any) -> Message:
            return asyncio.run_coroutine_threadsafe(ask(messages, **options), loop).result()

        try:
            given = await seat.environment.play(seat.episode.task, SeatModel(seat, ask, wait))
        except BaseException as error:
            self._failed(seat, error)
        else:
            self._returned(seat, given)

    def _in_thread(self, seat: Seat) -> None:
        """Play a plain episode."""
        play: Any = seat.environment.play  # whose model is called without `await`
        try:
            given = play(seat.episode.task, SeatModel(seat, seat.wait, seat.wait))
        except BaseException as error:
            self._failed(seat, error)
        else:
            self._returned(seat, given)

    def _in_worker(self, seat: Seat) -> None:
        """Let a process play an episode."""
        try:
            (found,) = seat.environment.worker_pool.run([seat.episode.task], listener=Listener(seat))
        except WorkerError as error:
            self.stop(error)
            return
        if isinstance(found, Lost):
            self._failed(seat, None, found.reason)
        elif "over" in found:
            self._failed(seat, Over())
        elif "error" in found:
            self.trace = self.trace or found["trace"]
            self._failed(seat, None, found["error"])
        else:
            self._returned(seat, outcome_of(found))

    def _returned(self, seat: Seat, given: Any) -> None:
        with self.changed:
            if seat.ended:
                return
            try:
                seat.episode.end(given)
            except EnvironmentFailure as error:
                self._fatal = self._fatal or error
            self._leave(seat)

    def _failed(self, seat: Seat, error: BaseException | None, text: str = "") -> None:
        """End an episode with an error, or the text of one that was raised in a process."""
        with self.changed:
            if seat.ended:
                return
            if isinstance(error, Over) or seat.told_over:
                self._end(seat, "over")
                return
            if error is not None:
                text = f"raised {type(error).__name__}: {error}"
                self.trace = self.trace or format_traceback(error)
            self._end(seat, "error", text, error)

    def _end(self, seat: Seat, kind: str, reason: str = "", error: BaseException | None = None) -> None:
        """End an episode without an outcome."""
        if seat.ended:
            return
        environment = seat.environment
        seat.episode.fail(kind, reason)
        if kind != "over" and environment.on_error == "raise" and self._fatal is None:
            self._fatal = EnvironmentFailure(f"environment={environment.name} {reason}")
            self._fatal.__cause__ = error
        self._leave(seat)

    def _leave(self, seat: Seat) -> None:
        seat.ended = True
        self._live.pop(seat.episode.place, None)
        self._left.append(seat.episode.place)
        if not seat.rests:
            self._is_idle()

    def _in_loop(self, work: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
        """Call `work` with each of the arguments in the event loop's thread, which is started at first."""

        def all_at_once() -> None:
            for each in arguments:
                work(*each)

        if not arguments:
            return
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=run_loop, args=(self._loop,), name="hf_rlhf-environments", daemon=True).start()
        self._loop.call_soon_threadsafe(all_at_once)

    def _close(self) -> None:
        """End what is left: episodes of an interrupted rollout, and the event loop."""
        with self.changed:
            left = list(self._live.values())
            for seat in left:
                seat.ended = True
            self._live.clear()
        for seat in left:
            for each in () if seat.in_loop else seat.asked:
                each.answered(None)
            if seat.worker is not None:
                seat.worker.stop()
        self.endpoint.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)


def _resolve(future: asyncio.Future[Message], message: Message | None) -> None:
    if not future.done() and message is not None:  # the episode was not cancelled
        future.set_result(message)
