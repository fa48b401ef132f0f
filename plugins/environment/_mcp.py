"""Tools of MCP servers (modelcontextprotocol.io), by the package `mcp`, version 1 or 2."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from ._calls import Observed, ToolUnavailable
from ._held import Held, first_of

UNREACHED = (-32000, -32001, 408)
"""Codes of errors of the connection; others are the server's answer to a call."""


class MCPServer:
    """A server at a URL (streamable HTTP), or started by a command (stdio), which all episodes share."""

    def __init__(self, place: str):
        self.place = place
        self._connection: Held | None = None
        self._lock = threading.Lock()

    def schemas(self) -> list[dict[str, Any]]:
        """Return its tools as JSON schemas. Raises `ValueError` if it cannot be reached."""
        try:
            _, tools = self._connected().value
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
        session, _ = connection.value
        try:
            async with asyncio.timeout(seconds):
                result = await asyncio.wrap_future(connection.begin(session.call_tool(name, dict(arguments))))
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

    def _connected(self) -> Held:
        with self._lock:
            if self._connection is None:
                try:
                    self._connection = Held(lambda: _session(self.place), "hf_rlhf-mcp")
                except ModuleNotFoundError as error:
                    raise ToolUnavailable(
                        f"mcp server {self.place} needs the package mcp. Run pip install mcp"
                    ) from error
                except Exception as error:
                    raise ToolUnavailable(f"mcp server {self.place} cannot be reached: {first_of(error)}") from error
            return self._connection

    def _drop(self, connection: Held | None) -> None:
        with self._lock:
            if connection is not None and connection is self._connection:
                self._connection = None
                connection.close()


@asynccontextmanager
async def _session(place: str) -> AsyncIterator[Any]:
    """Yield what has `call_tool`, and the list of tools."""
    import mcp

    program, *rest = shlex.split(place)
    is_url = place.startswith(("http://", "https://"))
    parameters = None if is_url else mcp.StdioServerParameters(command=program, args=rest, env=dict(os.environ))
    if hasattr(mcp, "Client"):
        async with mcp.Client(place if is_url else parameters) as client:
            yield client, await _tools(client)
        return
    from mcp.client.streamable_http import streamablehttp_client

    transport = streamablehttp_client(place) if is_url else mcp.stdio_client(parameters)
    async with transport as (read, write, *_), mcp.ClientSession(read, write) as session:
        await session.initialize()
        yield session, await _tools(session)


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
