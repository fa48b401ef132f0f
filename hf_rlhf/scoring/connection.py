"""Connections of uvicorn that end when a client keeps the server waiting, which uvicorn alone does not do."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)


def connection_type(seconds: float, most: int) -> type[asyncio.Protocol]:
    """Return the class of connections that wait at most `seconds` for a client; there are at most `most`."""
    return type("Connection", (Connection,), {"seconds": seconds, "most": most})


class Connection(H11Protocol):
    """HTTP connection, which is closed if the head of a request does not arrive in time, or an answer is not read in time.

    The app has its own time limit for bodies.
    """

    seconds: float
    most: int
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            logger.warning("closed a connection of %s: there are %d already", self.client, self.most)
            transport.abort()
        else:
            self._wait_for_client("sent no request")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete and not self.flow.write_paused:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait_for_client("did not read its answer")
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_client("did not read its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def _wait_for_client(self, what: str) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(self.seconds, self._give_up, what)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _give_up(self, what: str) -> None:
        if self.cycle is None or self.transport.get_write_buffer_size():  # not just idle
            client = ":".join(map(str, self.client or ("a client",)))
            logger.warning("closed the connection of %s, which %s in %g s", client, what, self.seconds)
        self.transport.abort()
