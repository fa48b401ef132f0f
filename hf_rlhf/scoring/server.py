"""HTTP server of reward sources (`hf-rlhf serve-reward`), for `rewards.remote` and other clients of its protocol.

Requests are handled by an event loop in a separate thread; the sources run in the main thread, one request at a time,
because only there can a call be interrupted at its time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import queue
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from hf_rlhf.batch import Rollouts
from hf_rlhf.data.sources import lacking
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.scoring.lookup import NO_TOKENS, NoTokens, columns_of

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from hf_rlhf.scoring.scorer import Scorer, SourceResult

logger = logging.getLogger(__name__)

VERSION = 1
"""Protocol version in every request and response."""
SHOWN_ERRORS = 100
"""Maximum failed rows named in a response."""


class RequestError(Exception):
    """Error for an invalid request: HTTP `status`, and a message that says what to send instead."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class ScoringQueue:
    """Queue of requests for the scoring thread; `scorers` has one per source, by label."""

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self.scorers = scorers
        self.sources = {label: scorer.sources[label] for label, scorer in scorers.items()}
        self._waiting: queue.SimpleQueue[tuple[str, Rollouts, Future[SourceResult]] | None] = queue.SimpleQueue()
        self._answered = 0

    def hand_in(self, label: str, rollouts: Rollouts) -> Future[SourceResult]:
        """Enqueue rows for the source `label` and return the future result."""
        future: Future[SourceResult] = Future()
        self._waiting.put((label, rollouts, future))
        return future

    def work(self) -> None:
        """Score enqueued requests in the calling thread until `stop`."""
        while (job := self._waiting.get()) is not None:
            label, rollouts, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self.scorers[label].ask(rollouts, self._answered, counts=False)[label])
            except Exception as error:
                future.set_exception(error)
            self._answered += 1

    def stop(self) -> None:
        """Stop `work` after the current request."""
        self._waiting.put(None)


def app_of(desk: ScoringQueue, *, token: str | None = None, max_bytes: int = 64 << 20) -> Starlette:
    """Create the app: POST /score/LABEL, /score if there is one source, GET /health."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    sources = desk.sources

    def checked(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RequestError(401, "this server needs a token. Send Authorization: Bearer ...")

    async def health(request: Request) -> Response:
        checked(request)
        listed = {label: {"use": s.name, "columns": sorted(columns_of(s))} for label, s in sources.items()}
        return JSONResponse({"version": VERSION, "sources": listed})

    async def score(request: Request) -> Response:
        checked(request)
        label = _label(request.path_params.get("label"), list(sources))
        rollouts = read_request(await _body(request, max_bytes), columns_of(sources[label]))
        asked = await asyncio.wrap_future(desk.hand_in(label, rollouts))
        return JSONResponse(answer(asked))

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse({"error": str(error)}, error.status)

    async def fail(request: Request, error: Exception) -> Response:
        logger.warning("%s %s: %s", request.method, request.url.path, error)
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
    handlers: dict[Any, Any] = {RequestError: refuse, UserError: fail, 404: no_route, 405: no_route, Exception: fail}
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


async def _body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise RequestError(
                413, f"the request must be at most {max_bytes / 2**20:.3g} MiB. Send fewer rows at a time"
            )
    return bytes(body)


def read_request(body: bytes, reads: set[str]) -> Rollouts:
    """Parse the rows of a request; `reads` are the columns that the source needs. Raises `RequestError`."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request must be JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(400, 'the request must be {"version": 1, "prompts": [...], "completions": [...]}')
    if data.get("version") != VERSION:
        raise RequestError(400, f"this server speaks protocol version {VERSION}, got {data.get('version')!r}")
    completions = _list(data, "completions", None, _is_text, "texts")
    rows = len(completions)
    prompts = _list(data, "prompts", rows, _is_prompt, "texts or lists of messages with role and content")
    reasons = _list(
        data, "finish_reasons", rows, lambda x: x in ("stop", "length"), "'stop' or 'length'", ["stop"] * rows
    )
    groups = _list(data, "group_ids", rows, _is_whole, "whole numbers", list(range(rows)))
    columns = data.get("columns", {})
    if not isinstance(columns, dict):
        raise RequestError(400, "columns must be a mapping of names to lists")
    missing = lacking(reads, columns)
    if missing:
        raise RequestError(
            422, f"this source reads the columns {', '.join(missing)}. Send them (`send` of rewards.remote)"
        )
    return Rollouts(
        prompts=prompts,
        completions=completions,
        finish_reasons=reasons,
        group_ids=groups,
        columns={name: _list(columns, name, rows, lambda x: True, "values") for name in columns},
        **_tokens(data, rows),
    )


def _tokens(data: dict[str, Any], rows: int) -> dict[str, list[Any]]:
    """Return prompt_ids, completion_ids and masks; those not sent are placeholders that raise an error when read."""
    unknown: list[Any] = [NoTokens()] * rows
    found = {
        name: _list(data, name, rows, _are_whole, "lists of whole numbers", unknown)
        for name in ("prompt_ids", "completion_ids", "masks")
    }
    if ("masks" in data) != ("completion_ids" in data) or (
        "masks" in data and list(map(len, found["masks"])) != list(map(len, found["completion_ids"]))
    ):
        raise RequestError(400, "completion_ids and masks must be sent together, with 0 or 1 for each token")
    return found


def _list(data: dict[str, Any], name: str, rows: int | None, good: Any, what: str, default: Any = None) -> list[Any]:
    if name not in data and default is not None:
        return list(default)
    values = data.get(name)
    if not isinstance(values, list):
        raise RequestError(400, f"{name} must be a list of one value per completion")
    if rows is not None and len(values) != rows:
        raise RequestError(400, f"{name} must have one value per completion ({rows}), got {len(values)}")
    wrong = next((i for i, value in enumerate(values) if not good(value)), None)
    if wrong is not None:
        raise RequestError(400, f"{name} must be {what}, got {str(values[wrong])[:60]!r} in row {wrong}")
    return values


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _is_prompt(value: Any) -> bool:
    messages = isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
    return isinstance(value, str) or messages


def answer(asked: SourceResult) -> dict[str, Any]:
    """Build the response to a request. Raises `RequestError` if the source needs token ids that were not sent."""
    import math

    from hf_rlhf.scoring.answers import as_json

    if any(NO_TOKENS in failure.reason for failure in asked.failures):
        raise RequestError(
            422,
            "this source reads token ids or masks. Send prompt_ids, completion_ids and masks (`send_ids: true` of "
            "rewards.remote)",
        )
    scores = [None if isinstance(x, float) and math.isnan(x) else as_json(x) for x in asked.answers]
    errors = [{"row": f.row, "kind": f.kind, "reason": f.reason} for f in asked.failures[:SHOWN_ERRORS]]
    return {"version": VERSION, "scores": scores, "errors": errors, "failed": len(asked.failures)}


def listening(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `UserError` if the address is unavailable."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}. Choose another --port or --host") from error


def serve(desk: ScoringQueue, app: Starlette, where: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. Call it in the main thread."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))

    def listen() -> None:
        try:
            server.run(sockets=[where])
        finally:
            desk.stop()

    thread = threading.Thread(target=listen, name="hf_rlhf-serve")
    with _interrupted_by_sigterm():
        thread.start()
        try:
            desk.work()
        except KeyboardInterrupt:
            logger.info("stopped")
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
