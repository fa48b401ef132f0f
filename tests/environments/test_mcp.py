"""Tools of MCP servers, with the package `mcp` itself, over stdio and HTTP."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import Task
from hf_rlhf_plugins.environment._calls import ToolUnavailable
from tests.helpers.waits import until

pytestmark = pytest.mark.environments
SERVER = Path(__file__).with_name("mcp_server.py")
COMMAND = f"{sys.executable} {SERVER}"


def children() -> set[int]:
    return {int(x) for file in Path("/proc/self/task").glob("*/children") for x in file.read_text().split()}


def answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=["stdio", "http"])
def place(request: Any) -> Iterator[str]:
    """Where a server is reached."""
    if request.param == "stdio":
        yield COMMAND
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVER), str(port)], stderr=subprocess.DEVNULL)
    until(lambda: answers(port), 60)
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    process.wait()


def play(environment: Any, *calls: tuple[str, dict[str, Any]]) -> list[str]:
    """What the policy reads of its calls, which are those of one turn."""
    made, asked = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls], list[list[str]]()

    async def model(messages: Any, **options: Any) -> Any:
        asked.append([message["content"] for message in messages if message["role"] == "tool"])
        return {"role": "assistant", "content": "", "tool_calls": made if len(asked) == 1 else []}

    task = Task(messages=[{"role": "user", "content": "q"}], columns={}, seed=0)
    asyncio.run(environment.play(task, model))
    return asked[-1]


def test_tools_of_a_server_are_called_side_by_side_and_their_failures_are_read(place: str) -> None:
    before = children()
    environment = load_plugin("environment", "tools", mcp=[place], tool_timeout=1.0)
    assert list(environment.check(None)) == []
    schemas = {schema["function"]["name"]: schema["function"] for schema in environment.tool_schemas()}
    assert list(schemas) == ["add", "slow", "die"]
    assert schemas["add"]["description"] == "Add two numbers."
    assert set(schemas["add"]["parameters"]["properties"]) == {"a", "b"}
    begin = time.monotonic()
    assert play(environment, *[("add", {"a": i, "b": 1}) for i in range(10)]) == [str(i + 1) for i in range(10)]
    assert time.monotonic() - begin < 10 * 0.3
    read = play(environment, ("add", {"a": "x"}), ("slow", {"seconds": 60}), ("none", {}), ("add", {"a": 1, "b": 1}))
    assert "valid integer" in read[0]
    assert read[1] == "error: took longer than 1 s and was ended"
    assert read[2] == "error: there is no tool 'none'; the tools are: add, slow, die"
    assert read[3] == "2"
    environment.close()
    assert children() <= before


def test_a_server_that_dies_is_started_again_and_the_call_is_tried_again(tmp_path: Path) -> None:
    environment = load_plugin("environment", "tools", mcp=[COMMAND])
    assert play(environment, ("die", {"file": str(tmp_path / "died")})) == ["lives"]
    (tmp_path / "died").unlink()
    environment.retries = 0
    with pytest.raises(ToolUnavailable, match=r"mcp server .*Connection closed"):
        play(environment, ("die", {"file": str(tmp_path / "died")}))
    environment.close()


@pytest.mark.parametrize("nowhere", ["/nowhere/server", "http://127.0.0.1:9/mcp"])
def test_a_server_that_is_not_there_is_refused_before_the_model_loads(nowhere: str) -> None:
    environment = load_plugin("environment", "tools", mcp=[nowhere])
    (problem,) = environment.check(None)
    assert problem.startswith(f"mcp server {nowhere} cannot be reached: ")


def test_functions_and_servers_offer_tools_together(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('def add(x: int) -> int:\n    """Add.\n\n    Args:\n        x: A number.\n    """\n    return x\n')
    both = load_plugin("environment", "tools", mcp=[COMMAND], tools=[f"{file}:add"])
    (problem,) = both.check(None)
    assert problem == "tools must have different names, got add twice"
    both.close()
