"""Client of one vLLM server: token ids in; ids, log-probs, finish reasons and versions of the weights out.

The server's own routes are used: `/inference/v1/generate`, and those of vLLM's development mode that hold the scheduler, call
the workers and name the weights.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from .._http import Endpoint, HttpError, shown
from ._vllm_child import SECONDS, answers

if TYPE_CHECKING:
    from ._vllm_child import Child

T = TypeVar("T")

TRIES = 3
"""Requests for a completion while its answer is incomplete, or from other weights than were sent."""
LARGEST = 1 << 30
"""Maximum bytes of an answer; a token takes about 130."""
GENERATE, RPC, VERSION = "/inference/v1/generate", "/collective_rpc", "/update_weight_version"
LOAD_ADAPTER, ADAPTER = "/v1/load_lora_adapter", "hf_rlhf_policy"
"""Route that loads an adapter, and the name that completions ask for it by."""
DEVELOPMENT = ("/server_info", RPC, "/pause", "/resume", VERSION)
"""Routes that only vLLM's development mode has."""
EXTENSION = "hf_rlhf_vllm_worker.Worker"
OK, NOT_FOUND = 200, 404
FACTS_SECONDS = 120.0
"""Most seconds for an answer about the server, which looks at its machine first."""


@dataclass(frozen=True)
class Sent:
    """Weights that servers were sent."""

    version: str
    send: Callable[[Server], Awaitable[None]]
    """Loads them into a server."""
    adapter: bool = False
    """True if they are those of an adapter."""


@dataclass(frozen=True)
class Row:
    """One completion."""

    ids: list[int]
    logps: list[float] | None
    finish_reason: str


class HalfAnswer(HttpError):
    """Raised for an answer that lacks something."""


def begin(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run asynchronous work in a thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(asyncio.run(work))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of asynchronous work, also where an event loop is running already, as in a notebook."""
    return begin(work).result()


@dataclass
class Server:
    """A vLLM server."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    """With the key, which no message contains."""
    timeout: float
    retries: int
    max_wait: float
    at_a_time: int | None
    child: Child | None = None
    """The process, if this one started it."""

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self._endpoints: dict[tuple[str, int], Endpoint] = {}
        self._loads = 0
        self._reloading: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
        self._lock = threading.Lock()

    async def post(self, path: str, retries: int | None = None, **body: Any) -> Any:
        """Post JSON; transient failures are retried, once more when a child that ended answers again. Raises `HttpError` with
        what the server said."""
        tries = self.retries if retries is None else retries
        with self._lock:
            endpoint = self._endpoints.setdefault(
                (path, tries),
                Endpoint(self.url + path, self.timeout, tries, self.max_wait, self.at_a_time, largest=LARGEST),
            )
        if self.child is None or not tries:
            return await endpoint.post(body, self.headers)
        starts = self.child.starts
        try:
            return await endpoint.post(body, self.headers)
        except HttpError as error:
            error.add_note(f"{self.url} is a server of this run. Its last lines:\n{self.child.tail()}")
            if not await asyncio.to_thread(self.child.is_back, starts):
                raise
        return await endpoint.post(body, self.headers)

    def wait(self, seconds: float) -> None:
        """Return when it answers. Raises `RuntimeError` if it does not in time."""
        until = time.monotonic() + seconds
        while not answers(self.url):
            if time.monotonic() > until:
                raise RuntimeError(f"rollout.serve: the vLLM server at {self.url} did not answer within {seconds:g} s")
            time.sleep(SECONDS)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The server's own `routes`, `version` and `config`; the latter are empty where it has no route for them."""
        import httpx

        found: dict[str, Any] = {"routes": [], "version": "", "config": {}}
        with httpx.Client(base_url=self.url, headers=dict(self.headers), timeout=FACTS_SECONDS) as client:
            found["routes"] = list(client.get("/openapi.json").raise_for_status().json()["paths"])
            if "/version" in found["routes"]:
                found["version"] = client.get("/version").raise_for_status().json()["version"]
            if "/server_info" in found["routes"]:
                said = client.get("/server_info", params={"config_format": "json"}).raise_for_status().json()
                found["config"] = said["vllm_config"]
        return found

    async def describe(self) -> dict[str, Any]:
        """Return what the worker extension says of the model."""
        return (await self.call("hf_rlhf_describe"))[0]

    async def call(self, method: str, *arguments: Any, repeat: bool = True) -> list[dict[str, Any]]:
        """Call a method of the worker extension (see `EngineServer`)."""
        given = {"args": arguments} if arguments else {}
        found = (await self.post(RPC, retries=None if repeat else 0, method=method, **given))["results"]
        errors = [worker["error"] for worker in found if "error" in worker]
        if errors:
            refused = HttpError(f"{self.url} cannot load the weights: {errors[0]}")
            refused.status = 200
            raise refused
        return list(found)

    async def load_adapter(self, folder: Path) -> None:
        """Load an adapter in place of the one before (see `EngineServer`)."""
        try:
            await self.post(LOAD_ADAPTER, lora_name=ADAPTER, lora_path=str(folder), load_inplace=True)
        except HttpError as error:
            if error.status != OK:  # else the answer is a sentence
                raise

    async def load(self, sent: Sent) -> None:
        """Let the server load weights while it generates nothing; its cache of prefixes is emptied.

        A server that is started again meanwhile must not get the name of weights that it lost: naming them is not repeated, but
        all of it.
        """
        for tries in range(TRIES):
            await self.post("/pause?mode=wait")
            try:
                await sent.send(self)
                await self.post(VERSION, retries=0, new_version=sent.version)
            except BaseException as error:
                with suppress(HttpError):
                    await self.post("/resume", retries=0)
                if not isinstance(error, HttpError) or error.status is not None or tries == TRIES - 1:
                    raise
            else:
                break
        await self.post("/resume")
        self._loads += 1

    async def complete(self, ids: Sequence[int], sampling: Mapping[str, Any], sent: Sent) -> list[Row]:
        """Return `n` completions of a prompt, sampled from the weights `sent`; weights that the server lost are sent again.

        A server that was started again has the weights of its command line, which its version shows.
        """
        failed: HttpError | None = None
        model: dict[str, Any] = {"model": ADAPTER} if sent.adapter else {}
        for _ in range(TRIES):
            loads = self._loads
            try:
                answer = await self.post(GENERATE, token_ids=list(ids), sampling_params=dict(sampling), **model)
                rows, versions = self.rows(answer, sampling)
            except HalfAnswer as error:
                failed = error
                continue
            except HttpError as error:
                if not (sent.adapter and error.status == NOT_FOUND):
                    raise
                rows, versions = [], {"of its command line, without the adapter"}
            if versions == {sent.version}:
                return rows
            failed = HttpError(
                f"{self.url} sampled from the weights {', '.join(sorted(versions))}, not from {sent.version}, which it was sent. "
                "If another run uses this server, give each its own"
            )
            async with self._reloading.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
                if self._loads == loads:
                    await self.load(sent)
        assert failed is not None
        raise failed

    def rows(self, answer: Any, sampling: Mapping[str, Any]) -> tuple[list[Row], set[str]]:
        """Return the completions in an answer, and the versions of the weights that they were sampled from."""
        try:
            choices, reports = answer["choices"], sampling.get("logprobs") is not None
            rows = [
                Row(
                    [int(i) for i in choice["token_ids"]],
                    [float(x["logprob"]) for x in choice["logprobs"]["content"]] if reports else None,
                    str(choice["finish_reason"]),
                )
                for choice in sorted(choices, key=lambda choice: choice["index"])
            ]
            spans = [span for choice in choices for span in choice["weight_versions"]]
            versions = {str(span["version"]) for span in spans}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HalfAnswer(f"{self.url}: an incomplete answer ({error!r}): {shown(str(answer))}") from error
        short = [row for row in rows if not row.ids or (row.logps is not None and len(row.logps) != len(row.ids))]
        if len(rows) != sampling["n"] or short or not versions:
            raise HalfAnswer(f"{self.url}: {len(rows)} of {sampling['n']} completions, {len(short)} of them incomplete")
        reasons = {row.finish_reason for row in rows} - {"stop", "length"}
        if reasons:
            raise HalfAnswer(f"{self.url}: completions that ended by {', '.join(sorted(reasons))}")
        return rows, versions
