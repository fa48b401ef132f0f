"""A server of tools, by the package `mcp`: over stdio, or over HTTP at the port of its argument."""

from __future__ import annotations

import asyncio
import os
import sys

from mcp.server.mcpserver import MCPServer

server = MCPServer("numbers")


@server.tool()
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    await asyncio.sleep(0.3)
    return a + b


@server.tool()
async def slow(seconds: float) -> str:
    """Sleep."""
    await asyncio.sleep(seconds)
    return "slept"


@server.tool()
def die(file: str) -> str:
    """End the server, once."""
    if os.path.exists(file):
        return "lives"
    open(file, "w").close()
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
