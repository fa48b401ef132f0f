"""HTTP server of reward sources (`hf-rlhf serve-reward`), for `rewards.remote` and other clients of its protocol.

An event loop in a separate thread handles requests. Sources with `workers: inline` run in the main thread, one request at a
time, because only there can a call be interrupted at its time limit; the others score several requests at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import itertools
import logging
import queue
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from hf_rlhf.batch import Rollouts
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.scoring.answers import RewardError
from hf_rlhf.scoring.lookup import columns_of
from hf_rlhf.scoring.protocol import VERSION, RequestError, answer, read_request

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from hf_rlhf.scoring.scorer import Scorer, SourceResult

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 500
"""Connections at a time; further ones are closed at once."""

LOOK_S = 0.5
"""Longest wait without a look for signals: one that arrives just before a thread begins to wait does not wake it."""

STOPPING = RequestError(503, "the server is stopping. Try again later")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of what clients send, and of the time they take."""

    request_bytes: int = 64 << 20
    """Largest body of a request."""
    total_bytes: int = 256 << 20
    """Largest sum of the bodies that are read, wait or are scored."""
    seconds: float = 30.0
    """Time for a client to send a request's head, then its body, and to read some of an answer."""


class ScoringQueue:
    """Requests that wait for their scores; `scorers` has one per source, by label.

    Inline sources score in the thread of `work`, the others in `concurrency` threads.
    """

    def __init__(self, scorers: Mapping[str, Scorer], concurrency: int = 1) -> None:
        self.scorers, self.concurrency = scorers, concurrency
        self.sources = {label: scorer.sources[label] for label, scorer in scorers.items()}
        self._inline: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._others: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._jobs: weakref.WeakSet[_Job] = weakref.WeakSet()
        self._stopping = False
        for i in range(concurrency if any(not scorer.inline for scorer in scorers.values()) else 0):
            threading.Thread(target=_work, args=(self._others,), name=f"hf_rlhf-serve-{i}", daemon=True).start()

    def concurrency_of(self, label: str) -> int:
        """Return the number of requests that a source scores at a time."""
        return 1 if self.scorers[label].inline else self.concurrency

    def hand_in(self, label: str, rollouts: Rollouts) -> _Job:
        """Enqueue rows for the source `label` and return the job, whose `result` is in the future."""
        scorer = self.scorers[label]
        job = _Job(scorer, label, rollouts, next(self._numbers))
        self._jobs.add(job)
        if self._stopping:
            job.end(STOPPING)
        (self._inline if scorer.inline else self._others).put(job)
        return job

    def work(self) -> None:
        """Score for inline sources in the calling thread until `stop` or `interrupt`."""
        _work(self._inline, lambda: self._stopping)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: stop `work`, even where `KeyboardInterrupt` is lost, as in `__del__` and weakref callbacks."""
        self._stopping = True
        self._inline.put(None)  # which is reentrant
        raise KeyboardInterrupt

    def stop(self) -> None:
        """Refuse all requests, and stop `work` after the current one."""
        self._stopping = True
        for job in list(self._jobs):
            job.end(STOPPING)
        self._inline.put(None)


class _Job:
    """A request's rows, and the result when they have been scored."""

    def __init__(self, scorer: Scorer, label: str, rollouts: Rollouts, number: int) -> None:
        self.result: Future[SourceResult] = Future()
        self._ended = threading.Event()
        self._ask = partial(scorer.ask, rollouts, number, counts=False, is_cancelled=self._ended.is_set)
        self._label = label

    def end(self, result: SourceResult | Exception) -> None:
        """Set the result, and score no further row."""
        self._ended.set()
        with contextlib.suppress(InvalidStateError):  # it has one
            self.result.set_exception(result) if isinstance(result, Exception) else self.result.set_result(result)

    def run(self) -> None:
        """Score the rows, unless nobody waits for them any more."""
        if self.result.done():
            return
        try:
            self.end(self._ask()[self._label])
        except Exception as error:
            self.end(error)


def _work(jobs: queue.SimpleQueue[_Job | None], is_stopping: Callable[[], bool] = lambda: False) -> None:
    while not is_stopping():
        try:
            job = jobs.get(timeout=LOOK_S)
        except queue.Empty:
            continue
        if job is None:
            return
        job.run()


def app_of(desk: ScoringQueue, *, token: str | None = None, limits: Limits | None = None) -> Starlette:
    """Create the app: POST /score/LABEL, /score if there is one source, GET /health."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    sources = desk.sources
    bodies = _Bodies(limits or Limits())

    def checked(request: Request) -> None:
        if token is not None and not _carries(request, token):
            raise RequestError(401, "this server needs a token. Send Authorization: Bearer ...")

    async def health(request: Request) -> Response:
        checked(request)
        listed = {
            label: {"use": s.name, "columns": sorted(columns_of(s)), "concurrency": desk.concurrency_of(label)}
            for label, s in sources.items()
        }
        return JSONResponse({"version": VERSION, "sources": listed})

    async def score(request: Request) -> Response:
        checked(request)
        label = _label(request.path_params.get("label"), list(sources))
        async with bodies.read(request) as body:
            job = desk.hand_in(label, read_request(body, columns_of(sources[label])))
            return JSONResponse(answer(await _scored(job, request)))

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse({"error": str(error)}, error.status, {"Retry-After": "1"} if error.status == 503 else None)

    async def gone(request: Request, error: Exception) -> Response:
        logger.warning("%s left before the answer to %s", _client(request), _path(request))
        return JSONResponse(None)  # which nobody gets

    async def fail(request: Request, error: Exception) -> Response:
        logger.warning("%s %s: %s", request.method, _path(request), error)
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)

    async def no_route(request: Request, error: Exception) -> Response:
        there = ", ".join(f"POST {path}" for path in paths(list(sources)))
        status = getattr(error, "status_code", 404)
        return JSONResponse({"error": f"no {request.method} {request.url.path}; use {there}, GET /health"}, status)

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/score", score, methods=["POST"]),
        Route("/score/{label:path}", score, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {RequestError: refuse, ClientDisconnect: gone, 404: no_route, 405: no_route}
    handlers |= dict.fromkeys((UserError, RewardError, Exception), fail)
    return Starlette(routes=routes, exception_handlers=handlers)


def paths(labels: Sequence[str]) -> list[str]:
    """Return the URL paths for requests."""
    from urllib.parse import quote

    return (["/score"] if len(labels) == 1 else []) + [f"/score/{quote(label)}" for label in labels]


def _label(asked: str | None, labels: Sequence[str]) -> str:
    if asked is None and len(labels) == 1:
        return labels[0]
    if asked is None or asked not in labels:
        raise RequestError(404, f"no source {asked or '(none named)'}; use {', '.join(paths(labels))}")
    return asked


def _carries(request: Request, token: str) -> bool:
    """Return True if a request carries the token, compared as bytes: clients send it as UTF-8, or as Latin-1."""
    scheme, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
    forms = [token.encode("utf-8", "surrogateescape")]
    with contextlib.suppress(UnicodeEncodeError):
        forms.append(token.encode("latin-1"))
    return scheme.lower() == b"bearer" and any(hmac.compare_digest(given.strip(), form) for form in forms)


def _path(request: Request) -> str:
    """Return the path as it was sent, without line breaks or escape codes."""
    return bytes(request.scope.get("raw_path", b"")).decode("ascii", "backslashreplace")


def _client(request: Request) -> str:
    return f"{request.client.host}:{request.client.port}" if request.client else "the client"


async def _scored(job: _Job, request: Request) -> SourceResult:
    """Return the scores. Raises `ClientDisconnect` if the client leaves first."""
    from starlette.requests import ClientDisconnect

    scored = asyncio.wrap_future(job.result)
    left: asyncio.Future[Any] = asyncio.ensure_future(
        request.receive()
    )  # after the body, there is nothing else to receive
    try:
        await asyncio.wait([scored, left], return_when=asyncio.FIRST_COMPLETED)
        if not scored.done():
            raise ClientDisconnect
        return scored.result()
    finally:
        scored.cancel()
        job.end(RequestError(499, "the client has left"))
        left.cancel()


class _Bodies:
    """Bodies of requests, each and in sum within the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._bytes = limits, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> Any:
        """Yield a body, which counts towards the sum until the end of the block. Raises `RequestError`."""
        body, limits = bytearray(), self._limits
        try:
            async with asyncio.timeout(limits.seconds):
                async for chunk in request.stream():
                    self._bytes += len(chunk)
                    body += chunk
                    if len(body) > limits.request_bytes:
                        most = f"{limits.request_bytes / 2**20:.3g} MiB"
                        raise RequestError(413, f"the request must be at most {most}. Send fewer rows at a time")
                    if self._bytes > limits.total_bytes:
                        raise RequestError(503, "the requests of all clients are too large in sum. Try again later")
            yield bytes(body)
        except TimeoutError:
            raise RequestError(408, f"the request must arrive within {limits.seconds:g} s") from None
        finally:
            self._bytes -= len(body)


def listening(host: str, port: int, token: str | None = None) -> socket.socket:
    """Return a listening socket. Raises `UserError` if the address is unavailable, or open to others without a token."""
    try:
        where = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}. Choose another --port or --host") from error
    address = ipaddress.ip_address(where.getsockname()[0].partition("%")[0])
    if token is None and not address.is_loopback:
        where.close()
        raise UserError(
            f"--host {host or '(all)'} can be reached from other machines, so requests must carry a token. Pass "
            "--token-env NAME, the environment variable with the token, or leave out --host"
        )
    where.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # connections inherit it
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # notice within a minute that a waiting client's machine is gone
            where.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return where


def serve(desk: ScoringQueue, app: Starlette, where: socket.socket, limits: Limits | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Call it in the main thread."""
    import uvicorn

    from hf_rlhf.scoring.connection import connection_type

    connection = connection_type((limits or Limits()).seconds, MAX_CONNECTIONS)
    config = uvicorn.Config(app, http=connection, ws="none", log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)

    def listen() -> None:
        try:
            server.run(sockets=[where])
        finally:
            desk.stop()

    thread = threading.Thread(target=listen, name="hf_rlhf-serve")
    with _interrupted(desk):
        thread.start()
        try:
            with contextlib.suppress(KeyboardInterrupt):
                desk.work()
            logger.info("stopped")
        finally:
            desk.stop()
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _interrupted(desk: ScoringQueue) -> Iterator[None]:
    before = {number: signal.signal(number, desk.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
