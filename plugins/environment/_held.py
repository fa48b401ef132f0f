"""An async context that is held open in a thread with an event loop of its own: the loop of a rollout ends with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

START_S = 60.0
"""Seconds for a context to open."""
CLOSE_S = 5.0


class Held:
    """A context, open until `close`. Raises what opening it raises."""

    def __init__(self, context: Callable[[], AbstractAsyncContextManager[Any]], name: str):
        self._ready: Future[Any] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._hold(context)), name=name, daemon=True)
        self._thread.start()
        try:
            self.value = self._ready.result(START_S)
            """Value of the context."""
        except BaseException:
            self.close()
            raise

    def begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Begin work in its loop. Raises `RuntimeError` if that has ended."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise

    def close(self) -> None:
        """Close the context."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(CLOSE_S)

    async def _hold(self, context: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with context() as value:
                self._ready.set_result(value)
                await self._stop.wait()
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)


def first_of(error: BaseException) -> str:
    """Return an error in words, of a group its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
