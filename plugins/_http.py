"""Client that posts JSON to a server: requests have time limits, answers size limits, and transient failures are retried
with exponential backoff and jitter."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

FIRST_WAIT = 0.5
"""Maximum seconds before the second try; doubles with each further one."""
LARGEST = 64 << 20
"""Maximum bytes of an answer."""


class HttpError(RuntimeError):
    """Error for an invalid answer of a server; the message contains its URL and the answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the answer, where one was read."""


class _TryAgain(Exception):
    """Transient failure that may be retried, with the seconds that the server asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await the calls together and return their results; the first error cancels the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_url(setting: str, url: str) -> None:
    """Check that a setting is a server's URL without a password. Raises `ValueError`."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"{setting} must be a URL such as http://127.0.0.1:8765/score, got {url!r}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{setting} must not contain a password. Use token_env or headers")


@dataclass
class _Session:
    """Client shared by the pending requests of an event loop."""

    client: httpx.AsyncClient
    slots: asyncio.Semaphore
    users: int = 0


class Endpoint:
    """URL to which JSON is posted. It can be used from several event loops, copied and pickled."""

    def __init__(
        self,
        url: str,
        timeout: float,
        retries: int,
        max_wait: float,
        at_a_time: int | None,
        per_minute: float | None = None,
        largest: int | None = None,
    ) -> None:
        self._settings = (url, timeout, retries, max_wait, at_a_time, per_minute, largest)
        self.url, self.timeout, self.retries, self.max_wait, self.at_a_time, self.per_minute = self._settings[:6]
        self.largest = largest or LARGEST
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self._lock = threading.Lock()
        self._next = 0.0
        self._jitter = random.Random()

    def __reduce__(self) -> Any:
        return Endpoint, self._settings

    async def post(self, body: Any, headers: Mapping[str, str]) -> Any:
        """Post `body` and return the JSON of the answer. Raises `HttpError` if all tries fail."""
        # escaped, because a completion may contain lone surrogates, which UTF-8 cannot encode
        content = json.dumps(plain(body), allow_nan=False).encode("ascii")
        async with self._session() as session:
            retrying = AsyncRetrying(
                retry=retry_if_exception_type(_TryAgain),
                stop=self._is_last,
                wait=self._wait,
                sleep=asyncio.sleep,
                retry_error_callback=self._fail,
            )
            return await retrying(self._send, session, content, headers)

    def _is_last(self, state: RetryCallState) -> bool:
        return state.attempt_number > self.retries or _failure(state).wait > self.max_wait

    def _wait(self, state: RetryCallState) -> float:
        """Return the seconds to wait: the longer of `Retry-After` and a jittered FIRST_WAIT * 2^(tries - 1)."""
        backoff = wait_exponential(multiplier=FIRST_WAIT, max=self.max_wait)(state) * self._jitter.uniform(0.5, 1.0)
        return max(_failure(state).wait, backoff)

    def _fail(self, state: RetryCallState) -> NoReturn:
        failed, tries = _failure(state), state.attempt_number
        reason = f" (tried {tries} times)" if tries > 1 else ""
        if tries <= self.retries:
            reason = f"; it asks to wait {failed.wait:g} s, and max_wait is {self.max_wait:g} s"
        raise HttpError(f"{self.url}: {failed}{reason}") from failed.__cause__

    async def _send(self, session: _Session, content: bytes, headers: Mapping[str, str]) -> Any:
        import httpx

        await asyncio.sleep(self._until_turn())
        given = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        sent = {name.encode(): value.encode("utf-8", "surrogateescape") for name, value in given.items()}
        async with session.slots:
            try:
                async with (
                    asyncio.timeout(self.timeout),
                    session.client.stream("POST", self.url, content=content, headers=sent) as response,
                ):
                    received = await self._received(response)
            except TimeoutError as error:
                raise _TryAgain(f"no answer within {self.timeout:g} s") from error
            except httpx.TransportError as error:
                raise _TryAgain(f"{type(error).__name__}: {error}") from error
            except httpx.HTTPError as error:
                raise HttpError(f"{self.url}: {type(error).__name__}: {error}") from error
        return self._read(response, received)

    async def _received(self, response: httpx.Response) -> bytes:
        received = bytearray()
        async for chunk in response.aiter_bytes():
            received += chunk
            if len(received) > self.largest:
                raise HttpError(f"{self.url}: the answer exceeds {self.largest >> 20} MiB")
        return bytes(received)

    def _read(self, response: httpx.Response, received: bytes) -> Any:
        head = shown(received.decode("utf-8", "replace"))
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _TryAgain(f"HTTP {response.status_code}: {head}", _asked_wait(response.headers.get("Retry-After")))
        if not response.is_success:
            raise HttpError(f"{self.url}: HTTP {response.status_code}: {head}", response.status_code)
        try:
            return json.loads(received, parse_constant=_no_constant, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise HttpError(f"{self.url}: the answer is not JSON ({error}): {head}", response.status_code) from error

    def _until_turn(self) -> float:
        """Return the seconds until this request may be sent; requests of all threads are spaced evenly."""
        if self.per_minute is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60.0 / self.per_minute
        return turn - now

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[_Session]:
        """Yield the running loop's client, created by its first user and closed by the last one."""
        import httpx

        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            limits = httpx.Limits(max_connections=self.at_a_time)
            client = httpx.AsyncClient(timeout=None, limits=limits, verify=certificates())  # noqa: S113  (asyncio.timeout bounds each request)
            session = self._sessions[loop] = _Session(client, asyncio.Semaphore(self.at_a_time or 2**31))
        session.users += 1
        try:
            yield session
        finally:
            session.users -= 1
            if not session.users:
                del self._sessions[loop]
                await session.client.aclose()


@cache
def certificates() -> Any:
    """Load the certificates once: it takes longer than a request."""
    import httpx

    return httpx.create_ssl_context()


def _failure(state: RetryCallState) -> _TryAgain:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, _TryAgain)
    return error


def _asked_wait(value: str | None) -> float:
    """Return the seconds in a header `Retry-After`, given as seconds or a date; 0 for anything else."""
    try:
        return max(0.0, float(value)) if value else 0.0
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value or "")
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def secret(setting: str, variable: str) -> str:
    """Return the value of an environment variable. Raises `ValueError` if it is not set."""
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ValueError(f"{setting}: environment variable {variable} is not set")
    return value


def shown(text: str, length: int = 200) -> str:
    """Truncate a text for a message."""
    return repr(text[:length]) + (f" ... ({len(text)} characters)" if len(text) > length else "")


def plain(value: Any) -> Any:
    """Convert a dataset's value to JSON types: NaN and infinite numbers to null, dates and similar to text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)
