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
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hf_rlhf.contract.environment import POLICY, Environment, Message, Over
from hf_rlhf.runtime.event_loop import run_loop
from hf_rlhf.runtime.plain_text import format_traceback
from hf_rlhf.runtime.worker_pool import Lost, WorkerError
from hf_rlhf.training.environments.endpoint import Endpoint
from hf_rlhf.training.environments.episode import EnvironmentFailure, Episode, Question, Reply
from hf_rlhf.training.environments.workers import outcome_of

Decode = Callable[[list[Question]], list[Reply]]


@dataclass(eq=False)
class Seat:
    """A live episode, and where it stands."""

    episode: Episode
    table: Lockstep
    since: float = field(default_factory=time.monotonic)
    """When the environment's turn began."""
    question: Question | None = None
    """Question that it waits for; None while the environment works."""
    ended: bool = False
    reply: Callable[[Message | None], None] | None = None
    """Gives the answer to who asked last, or None for `Over`."""
    task: asyncio.Task[None] | None = None
    worker: Any = None
    """The process in which it plays."""
    told_over: bool = False
    """True once a request to its URL got `Over`, which agents raise as errors of their own."""
    in_loop: bool = False
    """True if it plays on the event loop."""

    def ask(
        self, messages: Sequence[Message], options: dict[str, Any], reply: Callable[[Message | None], None]
    ) -> None:
        """Put a question to the policy, whose answer `reply` gets. Raises `Over` for an episode that has ended."""
        if self.ended:
            raise Over
        try:
            if self.question is not None:
                raise EnvironmentFailure(
                    f"environment={self.name} asks the policy twice at a time in one episode: await each answer before the next "
                    "question"
                )
            question = self.episode.ask(messages, **options)
        except Over:
            raise
        except Exception as error:  # not of the environment: tokens, templates, the contract
            self.table.stop(error)
            raise Over from error
        self.reply = reply
        self.table.waits(self, question)

    def wait(self, messages: Sequence[Message], **options: Any) -> Message:
        """Put a question to the policy and wait for its answer, in any thread but the event loop's. Raises `Over`."""
        box: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.ask(messages, _options(**options), box.put)
        if (message := box.get()) is None:
            raise Over
        return message

    @property
    def environment(self) -> Environment:
        """Return its environment, which a seat in a thread or the event loop has."""
        assert self.episode.environment is not None
        return self.episode.environment

    @property
    def name(self) -> str:
        """Return the name of its environment."""
        return self.environment.name


class _Model:
    """The policy as an environment gets it: a function, and a server of OpenAI's chat protocol."""

    def __init__(self, seat: Seat, ask: Callable[..., Any], wait: Callable[..., Message]):
        """`ask` is what the environment calls; `wait` blocks, in any thread but the event loop's."""
        self._seat, self._ask, self._wait = seat, ask, wait
        self._url: str | None = None
        self._one_at_a_time = threading.Lock()

    def __call__(self, messages: Sequence[Message], **options: Any) -> Any:
        return self._ask(messages, **options)

    @property
    def url(self) -> str:
        """See `hf_rlhf.axes.Model`."""
        if self._url is None:
            self._url = self._seat.table.endpoint.open(self._requested)
        return self._url

    def _requested(self, messages: Sequence[Message], **options: Any) -> Message:
        with self._one_at_a_time:
            try:
                return self._wait(messages, **options)
            except Over:
                self._seat.told_over = True
                raise


def _options(
    tools: Sequence[Any] | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] | None = None,
    agent: str = POLICY,
    train: bool = True,
) -> dict[str, Any]:
    return {"tools": tools, "max_tokens": max_tokens, "stop": stop, "agent": agent, "train": train}


class Lockstep:
    """Episodes of one rollout of this process. `decode` answers questions, in the order of their episodes."""

    def __init__(self, decode: Decode, dropped: Callable[[int], None] = lambda place: None):
        self._decode, self._dropped = decode, dropped
        self._changed = threading.Condition()
        self._live: dict[int, Seat] = {}
        self._busy = 0
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
                if self._fatal is None:
                    self._answer()
            if self._fatal is not None:
                raise self._fatal
        finally:
            self._close()

    def stop(self, error: BaseException) -> None:
        """End all episodes with an error, which `play` raises."""
        with self._changed:
            self._fatal = self._fatal or error
            self._changed.notify()

    def waits(self, seat: Seat, question: Question) -> None:
        """Note that an episode waits for the policy."""
        with self._changed:
            if seat.ended:
                raise Over
            seat.question = question
            self._is_idle()

    def recount(self) -> None:
        """Look again at when episodes are over time."""
        with self._changed:
            self._changed.notify()

    def _is_idle(self) -> None:
        self._busy, self._heard = self._busy - 1, time.monotonic()
        if self._busy == 0:
            self._changed.notify()

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
                seat.question = Question(episode=episode, prompt=episode.prompt)
            else:
                seat.in_loop = environment.asynchronous and not environment.plays_in_processes
                started.append(seat)
        todo.clear()
        todo.extend(later)
        with self._changed:
            self._busy += len(started)
        self._in_loop(self._begin, [(seat,) for seat in started if seat.in_loop])
        for seat in started:
            if seat.environment.plays_in_processes:
                seat.since = math.inf  # until its process begins
                threading.Thread(target=self._in_worker, args=(seat,), name=f"hf_rlhf-{seat.name}", daemon=True).start()
            elif not seat.in_loop:
                threading.Thread(target=self._in_thread, args=(seat,), name=f"hf_rlhf-{seat.name}", daemon=True).start()

    def _wait(self) -> None:
        """Wait until every live episode waits for the policy or has ended; give those up whose time is over."""
        start = time.monotonic()
        with self._changed:
            while self._busy and self._fatal is None:
                now = time.monotonic()
                working = [seat for seat in self._live.values() if seat.question is None]
                left = {seat: self._since(seat) + seat.environment.timeout - now for seat in working}
                for seat in [seat for seat, seconds in left.items() if seconds <= 0]:
                    self._end(seat, "timeout", f"took over {seat.environment.timeout:g} s between two turns")
                    if seat.task is not None and self._loop is not None:
                        self._loop.call_soon_threadsafe(seat.task.cancel)
                    if seat.worker is not None:
                        seat.worker.stop()
                if self._busy:
                    self._changed.wait(min(max(0.0, min(left.values(), default=0.0)), threading.TIMEOUT_MAX))
        self.waited += time.monotonic() - start

    def _since(self, seat: Seat) -> float:
        """Return when a seat's time began; those of the event loop wait for each other there."""
        return max(seat.since, self._heard) if seat.in_loop else seat.since

    def _answer(self) -> None:
        """Let the policy answer every episode that waits."""
        seats = [self._live[place] for place in sorted(self._live)]
        if not seats:
            return
        questions = [seat.question for seat in seats if seat.question is not None]
        replies = self._decode(questions)
        answers: list[tuple[Seat, Message]] = []
        for seat, question, reply in zip(seats, questions, replies, strict=True):
            if seat.episode.environment is None:
                seat.episode.reply = reply
                self._leave(seat)
            else:
                answers.append((seat, seat.episode.answer(question, reply)))
        now = time.monotonic()
        with self._changed:
            self._busy += len(answers)
            for seat, _ in answers:
                seat.question, seat.since = None, now
        for seat, message in answers:
            if not seat.in_loop and seat.reply is not None:
                seat.reply(message)
        self._in_loop(
            lambda reply, message: reply(message), [(seat.reply, message) for seat, message in answers if seat.in_loop]
        )

    def _begin(self, seat: Seat) -> None:
        seat.task = asyncio.ensure_future(self._awaited(seat))

    async def _awaited(self, seat: Seat) -> None:
        """Play an async episode."""
        loop = asyncio.get_running_loop()

        async def ask(messages: Sequence[Message], **options: Any) -> Message:
            future: asyncio.Future[Message] = loop.create_future()
            seat.ask(messages, _options(**options), partial(_resolve, future))
            return await future

        def wait(messages: Sequence[Message], **options: Any) -> Message:
            return asyncio.run_coroutine_threadsafe(ask(messages, **options), loop).result()

        try:
            given = await seat.environment.play(seat.episode.task, _Model(seat, ask, wait))
        except BaseException as error:
            self._failed(seat, error)
        else:
            self._returned(seat, given)

    def _in_thread(self, seat: Seat) -> None:
        """Play a plain episode."""
        play: Any = seat.environment.play  # whose model is called without `await`
        try:
            given = play(seat.episode.task, _Model(seat, seat.wait, seat.wait))
        except BaseException as error:
            self._failed(seat, error)
        else:
            self._returned(seat, given)

    def _in_worker(self, seat: Seat) -> None:
        """Let a process play an episode."""
        try:
            (found,) = seat.environment.worker_pool.run([seat.episode.task], listener=_Listener(seat))
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
        with self._changed:
            if seat.ended:
                return
            try:
                seat.episode.end(given)
            except EnvironmentFailure as error:
                self._fatal = self._fatal or error
            self._leave(seat)
            self._is_idle()

    def _failed(self, seat: Seat, error: BaseException | None, text: str = "") -> None:
        """End an episode with an error, or the text of one that was raised in a process."""
        with self._changed:
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
        self._is_idle()

    def _leave(self, seat: Seat) -> None:
        seat.ended = True
        self._live.pop(seat.episode.place, None)
        self._dropped(seat.episode.place)

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
        with self._changed:
            left = list(self._live.values())
            for seat in left:
                seat.ended = True
            self._live.clear()
        for seat in left:
            if seat.reply is not None and not seat.in_loop:
                seat.reply(None)
            if seat.worker is not None:
                seat.worker.stop()
        self.endpoint.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)


def _resolve(future: asyncio.Future[Message], message: Message | None) -> None:
    if not future.done() and message is not None:  # the episode was not cancelled
        future.set_result(message)


class _Listener:
    """Hears of an episode in a process."""

    def __init__(self, seat: Seat):
        self._seat, self._model = seat, _Model(seat, seat.wait, seat.wait)

    def started(self, worker: Any) -> None:
        """Begin its time."""
        self._seat.worker, self._seat.since = worker, time.monotonic()
        self._seat.table.recount()

    def asked(self, worker: Any, question: dict[str, Any]) -> None:
        """Put a question of the environment to the policy."""
        if "url" in question:
            worker.reply(self._model.url)
            return
        try:
            self._seat.ask(question["messages"], _options(**question["options"]), worker.reply)
        except Over:
            worker.reply(None)
