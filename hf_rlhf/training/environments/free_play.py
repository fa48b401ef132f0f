"""Play episodes freely: an engine that serves requests one by one gets each question when it is asked, and no episode waits
for another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from hf_rlhf.runtime.event_loop import run_loop
from hf_rlhf.training.environments.episode import Episode, Question, Reply
from hf_rlhf.training.environments.lockstep import Lockstep
from hf_rlhf.training.environments.seats import Asked, Seat

Sample = Callable[[Question], Coroutine[Any, Any, Reply]]


class FreePlay(Lockstep):
    """Episodes of one rollout of this process. `sample` answers a question, on an event loop of its own."""

    def __init__(self, sample: Sample):
        super().__init__(lambda asked: [])
        self._sample = sample
        self._requests = asyncio.new_event_loop()
        self._open = 0
        """Questions without an answer."""
        self._closed_at = 0.0
        """When there was none for the last time."""

    def play(self, episodes: Sequence[Episode]) -> None:
        """See `Lockstep.play`."""
        self._closed_at = time.monotonic()
        threading.Thread(target=run_loop, args=(self._requests,), name="hf_rlhf-requests", daemon=True).start()
        try:
            super().play(episodes)
        finally:
            self._requests.call_soon_threadsafe(self._requests.stop)

    def _start(self, todo: deque[Episode]) -> None:
        with self.changed:
            super()._start(todo)
            for seat in [s for s in self._live.values() if s.episode.environment is None and not s.sent]:
                self.waits(seat)

    def _wait(self) -> None:
        """Wait until an episode has ended, whose place another may take."""
        self._watch()

    def _answer(self) -> None:
        """Every question is answered by itself."""

    def waits(self, seat: Seat) -> None:
        """Send the question that an episode asked last."""
        with self.changed:
            if not self._open:
                self.waited += time.monotonic() - self._closed_at
            self._open += 1
            seat.sent += 1
            self._rest([seat])
            asyncio.run_coroutine_threadsafe(self._reply(seat, seat.asked[-1]), self._requests)

    async def _reply(self, seat: Seat, asked: Asked) -> None:
        try:
            reply = await self._sample(asked.question)
            self._answered(seat, asked, reply)
        except BaseException as error:
            self.stop(error)

    def _answered(self, seat: Seat, asked: Asked, reply: Reply) -> None:
        with self.changed:
            self._open, self._closed_at = self._open - 1, time.monotonic()
            if seat.ended:
                return
            seat.asked.remove(asked)
            if seat.episode.environment is None:
                seat.episode.reply = reply
                self._leave(seat)
                return
            message = seat.episode.answer(asked.question, reply)
            seat.since = time.monotonic()
            if not seat.asked:
                seat.rests = False
                self._busy += 1
        if seat.in_loop:
            self._in_loop(asked.answered, [(message,)])
        else:
            asked.answered(message)

    def _is_over(self) -> bool:
        return not self._live or bool(self._left)

    def _leave(self, seat: Seat) -> None:
        super()._leave(seat)
        self.changed.notify()
