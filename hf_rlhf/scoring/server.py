"""`hf-rlhf serve-reward`: reward sources behind HTTP, for `rewards.remote` and for whoever speaks its protocol.

Requests are answered in an event loop in a thread of its own; the sources run in the main thread, one request after the
other, because only there can a call that takes too long be interrupted.
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
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.scoring.lookup import NO_TOKENS, NoTokens, columns_of

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from hf_rlhf.scoring.scorer import Scorer, SourceResult

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the protocol, in every request and every answer."""
SHOWN_ERRORS = 100
"""Failed rows that an answer names at most."""


class RequestError(Exception):
    """A request that cannot be answered as it stands: `status` and what to send instead."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class ScoringQueue:
    """Where requests wait for the thread that scores them. `scorers`: one for each source, under its label."""

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self.scorers = scorers
        self.sources = {label: scorer.sources[label] for label, scorer in scorers.items()}
        self._waiting: queue.SimpleQueue[tuple[str, Rollouts, Future[SourceResult]] | None] = queue.SimpleQueue()
        self._answered = 0

    def hand_in(self, label: str, rollouts: Rollouts) -> Future[SourceResult]:
        """What the source `label` says of these rows, once it is asked."""
        future: Future[SourceResult] = Future()
        self._waiting.put((label, rollouts, future))
        return future

    def work(self) -> None:
        """Scores what is handed in until `stop`, in the calling thread."""
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
        """Ends `work` after what it does now."""
        self._waiting.put(None)


def app_of(desk: ScoringQueue, *, token: str | None = None, max_bytes: int = 64 << 20) -> Starlette:
    """The server: POST /score/LABEL, /score where there is one source, GET /health."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    sources = desk.sources

    def checked(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RequestError(401, "this server wants its token: Authorization: Bearer ...")

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
        return JSONResponse({"error": f"{request.method} {request.url.path}: there are {there}, GET /health"}, status)

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/score", score, methods=["POST"]),
        Route("/score/{label:path}", score, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {RequestError: refuse, UserError: fail, 404: no_route, 405: no_route, Exception: fail}
    return Starlette(routes=routes, exception_handlers=handlers)


def paths(labels: Sequence[str]) -> list[str]:
    """Where requests are posted."""
    from urllib.parse import quote

    return (["/score"] if len(labels) == 1 else []) + [f"/score/{quote(label)}" for label in labels]


def _label(asked: str | None, labels: Sequence[str]) -> str:
    if asked is None and len(labels) == 1:
        return labels[0]
    if asked is None or asked not in labels:
        raise RequestError(404, f"no source {asked or '(none named)'}: there are {', '.join(paths(labels))}")
    return asked


async def _body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise RequestError(
                413, f"the request is larger than {max_bytes / 2**20:.3g} MiB: send fewer rows at a time"
            )
    return bytes(body)


def read_request(body: bytes, reads: set[str]) -> Rollouts:
    """The rows of a request; `reads`: the columns that the source needs. Raises `RequestError` saying what is wrong."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(400, 'the request is no object {"version": 1, "prompts": [...], "completions": [...]}')
    if data.get("version") != VERSION:
        raise RequestError(400, f"version {VERSION} of the protocol is spoken here, not {data.get('version')!r}")
    completions = _list(data, "completions", None, _is_text, "texts")
    rows = len(completions)
    prompts = _list(data, "prompts", rows, _is_prompt, "texts or lists of messages with role and content")
    reasons = _list(
        data, "finish_reasons", rows, lambda x: x in ("stop", "length"), "'stop' or 'length'", ["stop"] * rows
    )
    groups = _list(data, "group_ids", rows, _is_whole, "whole numbers", list(range(rows)))
    columns = data.get("columns", {})
    if not isinstance(columns, dict):
        raise RequestError(400, "columns: a mapping of names to lists is due")
    missing = sorted(reads - columns.keys())
    if missing:
        raise RequestError(
            422, f"this source reads the columns {', '.join(missing)}: send them (`send` of rewards.remote)"
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
    """prompt_ids, completion_ids and masks; where they are not sent, what says so to whoever reads them."""
    unknown: list[Any] = [NoTokens()] * rows
    found = {
        name: _list(data, name, rows, _are_whole, "lists of whole numbers", unknown)
        for name in ("prompt_ids", "completion_ids", "masks")
    }
    if ("masks" in data) != ("completion_ids" in data) or (
        "masks" in data and list(map(len, found["masks"])) != list(map(len, found["completion_ids"]))
    ):
        raise RequestError(400, "completion_ids and masks belong together: one mask of 0 and 1 for each token")
    return found


def _list(data: dict[str, Any], name: str, rows: int | None, good: Any, what: str, default: Any = None) -> list[Any]:
    if name not in data and default is not None:
        return list(default)
    values = data.get(name)
    if not isinstance(values, list):
        raise RequestError(400, f"{name}: a list is due, one value per completion")
    if rows is not None and len(values) != rows:
        raise RequestError(400, f"{name}: {len(values)} values for {rows} completions")
    wrong = next((i for i, value in enumerate(values) if not good(value)), None)
    if wrong is not None:
        raise RequestError(400, f"{name}: row {wrong} is {str(values[wrong])[:60]!r}; {what} are due")
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
    """The answer to a request. Raises `RequestError` where the source needs token ids that were not sent."""
    import math

    from hf_rlhf.scoring.answers import as_json

    if any(NO_TOKENS in failure.reason for failure in asked.failures):
        raise RequestError(
            422,
            "this source reads token ids or masks: send prompt_ids, completion_ids and masks (`send_ids: true` of "
            "rewards.remote)",
        )
    scores = [None if isinstance(x, float) and math.isnan(x) else as_json(x) for x in asked.answers]
    errors = [{"row": f.row, "kind": f.kind, "reason": f.reason} for f in asked.failures[:SHOWN_ERRORS]]
    return {"version": VERSION, "scores": scores, "errors": errors, "failed": len(asked.failures)}


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UserError` where the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from error


def serve(desk: ScoringQueue, app: Starlette, where: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM. Call it in the main thread."""
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
