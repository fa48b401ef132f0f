"""Tools of MCP servers (modelcontextprotocol.io), by the package `mcp`, version 1 or 2."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Any

from ._calls import Observed, ToolUnavailable

START_S = 60.0
"""Seconds for a server to start and list its tools."""
CLOSE_S = 5.0
UNREACHED = (-32000, -32001, 408)
"""Codes of errors of the connection; others are the server's answer to a call."""


class MCPServer:
    """A server at a URL (streamable HTTP), or started by a command (stdio), which all episodes share."""

    def __init__(self, place: str):
        self.place = place
        self._connection: _Connection | None = None
        self._lock = threading.Lock()

    def schemas(self) -> list[dict[str, Any]]:
        """Return its tools as JSON schemas. Raises `ValueError` if it cannot be reached."""
        try:
            tools = self._connected().tools
        except ToolUnavailable as error:
            raise ValueError(str(error)) from error
        return [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description or "", "parameters": _input(t)},
            }
            for t in tools
        ]

    async def call(self, name: str, arguments: Mapping[str, Any], seconds: float) -> str:
        """Call a tool. Raises `Observed` for its errors, `ToolUnavailable` if it is not reached, and `TimeoutError`."""
        connection = await asyncio.to_thread(self._connected)
        try:
            async with asyncio.timeout(seconds):
                result = await asyncio.wrap_future(connection.call(name, dict(arguments)))
        except TimeoutError:
            raise
        except Exception as error:
            code = getattr(getattr(error, "error", error), "code", None)
            if code is not None and code not in UNREACHED:
                raise Observed(str(getattr(error, "message", error))) from error
            self._drop(connection)
            raise ToolUnavailable(f"mcp server {self.place}: {type(error).__name__}: {error}") from error
        text = _text(result)
        if getattr(result, "isError", False) or getattr(result, "is_error", False):
            raise Observed(text)
        return text

    def close(self) -> None:
        """Disconnect, and end a server that was started."""
        self._drop(self._connection)

    def _connected(self) -> _Connection:
        with self._lock:
            if self._connection is None:
                self._connection = _Connection(self.place)
            return self._connection

    def _drop(self, connection: _Connection | None) -> None:
        with self._lock:
            if connection is not None and connection is self._connection:
                self._connection = None
                connection.close()


class _Connection:
    """A session in a thread with an event loop of its own: the loop of a rollout ends with it."""

    def __init__(self, place: str):
        self._ready: Future[Any] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(place)), name="hf_rlhf-mcp", daemon=True)
        self._thread.start()
        try:
            self._session, self.tools = self._ready.result(START_S)
        except Exception as error:
            self.close()
            raise ToolUnavailable(f"mcp server {place} cannot be reached: {_first(error)}") from error

    def call(self, name: str, arguments: dict[str, Any]) -> Future[Any]:
        """Begin a call."""
        asked = self._session.call_tool(name, arguments)
        try:
            return asyncio.run_coroutine_threadsafe(asked, self._loop)
        except RuntimeError:  # the loop has ended
            asked.close()
            raise

    def close(self) -> None:
        """End the session."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(CLOSE_S)

    async def _serve(self, place: str) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with _session(place) as session:
                self._ready.set_result((session, await _tools(session)))
                await self._stop.wait()
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)


@asynccontextmanager
async def _session(place: str) -> AsyncIterator[Any]:
    """Yield what has `list_tools` and `call_tool`."""
    import mcp

    program, *rest = shlex.split(place)
    is_url = place.startswith(("http://", "https://"))
    parameters = None if is_url else mcp.StdioServerParameters(command=program, args=rest, env=dict(os.environ))
    if hasattr(mcp, "Client"):
        async with mcp.Client(place if is_url else parameters) as client:
            yield client
        return
    from mcp.client.streamable_http import streamablehttp_client

    transport = streamablehttp_client(place) if is_url else mcp.stdio_client(parameters)
    async with transport as (read, write, *_), mcp.ClientSession(read, write) as session:
        await session.initialize()
        yield session


async def _tools(session: Any) -> list[Any]:
    listed = await session.list_tools()
    tools = list(listed.tools)
    while cursor := getattr(listed, "nextCursor", None) or getattr(listed, "next_cursor", None):
        listed = await session.list_tools(cursor=cursor)
        tools += listed.tools
    return tools


def _input(tool: Any) -> dict[str, Any]:
    return dict(tool.inputSchema if hasattr(tool, "inputSchema") else tool.input_schema)


def _text(result: Any) -> str:
    parts = [getattr(part, "text", None) or f"[{part.type}]" for part in result.content]
    structured = getattr(result, "structuredContent", None) or getattr(result, "structured_content", None)
    return "\n".join(parts) if parts or structured is None else json.dumps(structured, ensure_ascii=False)


def _first(error: BaseException) -> str:
    """Return an error in words, of a group its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ModuleNotFoundError) and error.name == "mcp":
        return "it needs the package mcp. Run pip install mcp"
    return f"{type(error).__name__}: {error}"
