"""Seats of live episodes: what one asks of the policy, from an event loop, a thread or a process, and who hears the answer."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from hf_rlhf.contract.environment import POLICY, Environment, Message, Over
from hf_rlhf.training.environments.endpoint import Endpoint
from hf_rlhf.training.environments.episode import Episode, Question

Answered = Callable[[Message | None], None]
"""Gets the answer to a question, or None for `Over`."""


class Asked(NamedTuple):
    """A question that waits for the policy."""

    question: Question
    answered: Answered


class Table(Protocol):
    """The table at which episodes play: see `Lockstep`."""

    changed: threading.Condition
    endpoint: Endpoint

    def stop(self, error: BaseException) -> None:
        """End all episodes with an error."""

    def waits(self, seat: Seat) -> None:
        """Note a question of an episode."""

    def recount(self) -> None:
        """Look again at when episodes are over time."""


@dataclass(eq=False)
class Seat:
    """A live episode, and where it stands."""

    episode: Episode
    table: Table
    since: float = field(default_factory=time.monotonic)
    """When the environment's turn began."""
    asked: list[Asked] = field(default_factory=list)
    """Questions without an answer, in their order."""
    rests: bool = False
    """True while it only waits for answers; False while the environment works."""
    sent: int = 0
    """Questions that were put to an engine which answers them one by one."""
    ended: bool = False
    task: asyncio.Task[None] | None = None
    worker: Any = None
    """The process in which it plays."""
    told_over: bool = False
    """True once a request to its URL got `Over`, which agents raise as errors of their own."""
    in_loop: bool = False
    """True if it plays on the event loop."""

    def ask(self, messages: Sequence[Message], options: dict[str, Any], answered: Answered) -> None:
        """Put a question to the policy, whose answer `answered` gets. Raises `Over` for an episode that has ended."""
        with self.table.changed:
            if self.ended:
                raise Over
            try:
                self.asked.append(Asked(self.episode.ask(messages, **options), answered))
            except Over:
                raise
            except Exception as error:  # not of the environment: tokens, templates, the contract
                self.table.stop(error)
                raise Over from error
            self.table.waits(self)

    def wait(self, messages: Sequence[Message], **options: Any) -> Message:
        """Put a question to the policy and wait for its answer, in any thread but the event loop's. Raises `Over`."""
        box: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.ask(messages, options_of(**options), box.put)
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


class SeatModel:
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


def options_of(
    tools: Sequence[Any] | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] | None = None,
    agent: str = POLICY,
    train: bool = True,
) -> dict[str, Any]:
    """Return the options of a question, as the policy's function takes them."""
    return {"tools": tools, "max_tokens": max_tokens, "stop": stop, "agent": agent, "train": train}


class Listener:
    """Hears of an episode in a process."""

    def __init__(self, seat: Seat):
        self._seat, self._model = seat, SeatModel(seat, seat.wait, seat.wait)

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
            self._seat.ask(question["messages"], options_of(**question["options"]), worker.reply)
        except Over:
            worker.reply(None)
