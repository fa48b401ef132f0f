"""Play episodes in lockstep: the engine decodes whenever every live episode waits for it, rows in order.

Async environments share an event loop in a thread; each episode of a plain one has a thread of its own. The caller's thread
decodes, so that its gradient mode, autocast and signals are the engine's. Who waits for whom is kept under one lock, and the
caller is woken once per turn. An episode that takes longer than its environment's `timeout` between two turns is given up;
a thread that hangs is abandoned, as are episodes whose event loop is blocked.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf.contract.environment import Environment, Message, Over
from hf_rlhf.runtime.event_loop import run_loop
from hf_rlhf.runtime.plain_text import format_traceback
from hf_rlhf.training.environments.endpoint import Endpoint
from hf_rlhf.training.environments.episode import POLICY, EnvironmentFailure, Episode, Question, Reply

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
    reply: Any = None
    """Gives its thread, or the event loop, the answer: a queue or a future."""
    task: asyncio.Task[None] | None = None
    told_over: bool = False
    """True once a request to its URL got `Over`, which agents raise as errors of their own."""

    def ask(self, messages: Sequence[Message], options: dict[str, Any]) -> None:
        """Put a question to the policy. Raises `Over` for an episode that has ended."""
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
        self.table.waits(self, question)

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

    def _is_idle(self) -> None:
        self._busy, self._heard = self._busy - 1, time.monotonic()
        if self._busy == 0:
            self._changed.notify()

    def _start(self, todo: deque[Episode]) -> None:
        """Start episodes, in order, as many at a time as their environments take."""
        started, later = [], []
        for episode in todo:
            environment = episode.environment
            most = None if environment is None else environment.max_live
            if most is not None and sum(s.episode.environment is environment for s in self._live.values()) >= most:
                later.append(episode)
                continue
            seat = self._live[episode.place] = Seat(episode, self)
            if environment is None:
                seat.question = Question(episode=episode, prompt=episode.prompt)
            else:
                started.append(seat)
        todo.clear()
        todo.extend(later)
        with self._changed:
            self._busy += len(started)
        self._in_loop(self._begin, [(seat,) for seat in started if seat.environment.asynchronous])
        for seat in started:
            if not seat.environment.asynchronous:
                seat.reply = queue.SimpleQueue()
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
                if self._busy:
                    self._changed.wait(max(0.0, min(left.values(), default=0.0)))
        self.waited += time.monotonic() - start

    def _since(self, seat: Seat) -> float:
        """Return when a seat's time began; those of the event loop wait for each other there."""
        return seat.since if isinstance(seat.reply, queue.SimpleQueue) else max(seat.since, self._heard)

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
                seat.episode.reply, seat.episode.finish_reason = reply, reply.finish_reason
                self._leave(seat)
            else:
                answers.append((seat, seat.episode.answer(question, reply)))
        now = time.monotonic()
        with self._changed:
            self._busy += len(answers)
            for seat, _ in answers:
                seat.question, seat.since = None, now
        for seat, message in answers:
            if seat.task is None:
                seat.reply.put(message)
        self._in_loop(_resolve, [(seat.reply, message) for seat, message in answers if seat.task is not None])

    def _begin(self, seat: Seat) -> None:
        seat.task = asyncio.ensure_future(self._awaited(seat))

    async def _awaited(self, seat: Seat) -> None:
        """Play an async episode."""
        loop = asyncio.get_running_loop()

        async def ask(messages: Sequence[Message], **options: Any) -> Message:
            seat.reply = loop.create_future()
            seat.ask(messages, _options(**options))
            return await seat.reply

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

        def ask(messages: Sequence[Message], **options: Any) -> Message:
            seat.ask(messages, _options(**options))
            message: Message | None = seat.reply.get()
            if message is None:
                raise Over
            return message

        play: Any = seat.environment.play  # whose model is called without `await`
        try:
            given = play(seat.episode.task, _Model(seat, ask, ask))
        except BaseException as error:
            self._failed(seat, error)
        else:
            self._returned(seat, given)

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

    def _failed(self, seat: Seat, error: BaseException) -> None:
        with self._changed:
            if seat.ended:
                return
            if isinstance(error, Over) or seat.told_over:
                self._end(seat, "over")
                return
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
            if isinstance(seat.reply, queue.SimpleQueue):
                seat.reply.put(None)
        self.endpoint.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)


def _resolve(future: asyncio.Future[Message], message: Message) -> None:
    if not future.done():  # the episode was cancelled
        future.set_result(message)
