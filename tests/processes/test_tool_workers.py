"""Tools in processes: results and errors as inline; one that blocks or dies is ended, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import Task
from hf_rlhf_plugins.environment._calls import Observed, ToolUnavailable
from hf_rlhf_plugins.environment._tool_processes import ToolPool
from hf_rlhf_plugins.rewards._sandbox.bubblewrap import Bubblewrap

FILE = """
import os, time

def add(a: int, b: int) -> int:
    print("not a result")
    return a + b

def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return f"slept {os.getpid()}"

def die(code: int) -> None:
    os._exit(code)

def gone(url: str) -> None:
    raise ConnectionError(url)

def leave(code: int) -> None:
    raise SystemExit(code)

def wrong(word: str) -> None:
    raise ValueError(word)
"""
NAMES = ("add", "sleep", "die", "gone", "leave", "wrong")


@pytest.fixture
def pool(tmp_path):
    file = tmp_path / "my_tools.py"
    file.write_text(FILE)
    made = ToolPool({name: f"{file}:{name}" for name in NAMES}, count=2, seconds=2.0)
    yield made
    running = pids(made)
    made.close()
    assert running
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)


def pids(pool):
    return [worker._process.pid for worker in pool._pool._workers]


def call(pool, *given):
    async def all_of_them():
        return await asyncio.gather(*(pool.call(name, arguments) for name, arguments in given), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_results_and_errors(pool):
    assert call(pool, ("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})) == ["3", "7"]
    wrong, gone = call(pool, ("wrong", {"word": "x"}), ("gone", {"url": "x"}))
    assert isinstance(wrong, Observed)
    assert str(wrong) == "ValueError: x"
    assert isinstance(gone, ToolUnavailable)
    assert str(call(pool, ("leave", {"code": 3}))[0]) == "SystemExit: 3"
    assert len(pids(pool)) == 2


def test_a_tool_that_blocks_is_ended_and_the_others_go_on(pool):
    call(pool, ("add", {"a": 1, "b": 2}), ("add", {"a": 1, "b": 2}))
    begin = time.monotonic()
    given = call(pool, ("sleep", {"seconds": 60}), ("sleep", {"seconds": 0}), ("add", {"a": 1, "b": 2}))
    assert time.monotonic() - begin < 30
    assert str(given[0]) == "took longer than 2 s and was ended"
    assert given[2] == "3"
    assert call(pool, ("add", {"a": 1, "b": 2})) == ["3"]


def test_a_process_that_dies_is_the_infrastructure(pool):
    (given,) = call(pool, ("die", {"code": 3}))
    assert isinstance(given, ToolUnavailable)
    assert "exit code 3" in str(given)
    assert call(pool, ("add", {"a": 1, "b": 2})) == ["3"]


def test_the_policy_reads_the_same_of_a_process_as_inline(tmp_path):
    file = tmp_path / "my_tools.py"
    file.write_text(
        'def f(x: int) -> int:\n    """Halve.\n\n    Args:\n        x: A number.\n    """\n    return 4 // x\n'
    )
    given = [{"type": "function", "function": {"name": "f", "arguments": {"x": x}}} for x in (2, 0, "a")]
    read = []

    async def model(messages, **options):
        read.append([message["content"] for message in messages if message["role"] == "tool"])
        return {"role": "assistant", "content": "", "tool_calls": given if len(read) % 2 else []}

    for workers in ("processes", "inline"):
        environment = load_plugin("environment", "tools", tools=[f"{file}:f"], workers=workers)
        asyncio.run(environment.play(Task(messages=[{"role": "user", "content": "q"}], columns={}, seed=0), model))
        environment.close()
    assert read[1] == read[3]
    assert read[1][:2] == ["2", "error: ZeroDivisionError: integer division or modulo by zero"]


@pytest.mark.skipif(Bubblewrap(None).problem() is not None, reason="no sandbox here")
def test_programs_of_the_policy_run_in_the_sandbox():
    programs = [
        "print(3 * 4)",
        "print(1)\n1 / 0",
        "1 +",
        "import time; time.sleep(60)",
        "open('/etc/passwd2', 'w')",
        "",
    ]
    given = [{"type": "function", "function": {"name": "python", "arguments": {"code": code}}} for code in programs]
    read = []

    async def model(messages, **options):
        read.append([message["content"] for message in messages if message["role"] == "tool"])
        return {"role": "assistant", "content": "", "tool_calls": given if len(read) == 1 else []}

    environment = load_plugin("environment", "tools", python={"time_limit": 2.0})
    assert list(environment.check(None)) == []
    asyncio.run(environment.play(Task(messages=[{"role": "user", "content": "q"}], columns={}, seed=0), model))
    environment.close()
    first, *failed, last = read[1]
    assert (first.strip(), last) == ("12", "")
    assert failed[0] == "1\nZeroDivisionError: division by zero\n"
    assert "SyntaxError" in failed[1]
    assert failed[2].startswith("error: ")
    assert "Error" in failed[3]


def test_functions_themselves_are_sent():
    def here(word: str) -> str:
        return f"{word} {os.getpid()}"

    pool = ToolPool({"here": here}, count=1, seconds=30.0)
    try:
        (given,) = call(pool, ("here", {"word": "x"}))
        assert given.startswith("x ")
        assert given != f"x {os.getpid()}"
    finally:
        pool.close()


def test_a_file_that_cannot_be_loaded_is_said(tmp_path):
    pool = ToolPool({"f": f"{tmp_path}/none.py:f"}, count=1, seconds=30.0)
    (given,) = call(pool, ("f", {}))
    pool.close()
    assert isinstance(given, ToolUnavailable)
    assert "no such file" in str(given)
