"""Tools in processes, so that one that blocks can be ended."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle

from hf_rlhf.axes import Lost, WorkerError, WorkerPool, worker_processes

from .._functions import load_function
from ._calls import Observed, ToolUnavailable, as_text, in_words, is_infrastructure


class ToolServer:
    """Runs calls in a process: a unit is a tool's name and its arguments."""

    def __init__(self, body: bytes) -> None:
        given: dict[str, str | Callable[..., Any]] = pickle.loads(body)  # noqa: S301  (from the parent)
        self._functions = {name: load_function(f, "tool") if isinstance(f, str) else f for name, f in given.items()}

    def run(self, state: bytes | None, unit: tuple[str, dict[str, Any]], ask: Any) -> dict[str, Any]:
        name, arguments = unit
        try:
            return {"text": as_text(self._functions[name](**arguments))}
        except (Exception, SystemExit) as error:
            return {"error": in_words(error).removeprefix("error: "), "infrastructure": is_infrastructure(error)}

    def close(self) -> None:
        """Do nothing: functions hold nothing."""


class ToolPool:
    """Processes with the functions: `file.py:name`, `package.module:name`, or themselves."""

    def __init__(self, functions: Mapping[str, str | Callable[..., Any]], count: int, seconds: float) -> None:
        server = f"{ToolServer.__module__}:{ToolServer.__name__}"
        start = worker_processes(server, cloudpickle.dumps(dict(functions)), timeout=seconds)
        self._pool = WorkerPool("environment=tools", start, count=count, timeout=seconds)
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="hf_rlhf-tools")
        self._seconds = seconds

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Run a tool in an idle process. Raises `Observed` for its errors and its end, `ToolUnavailable` without a process."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._call, name, dict(arguments))

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        try:
            (found,) = self._pool.run([(name, arguments)])
        except WorkerError as error:
            raise ToolUnavailable(str(error)) from error
        if isinstance(found, Lost) and found.kind == "timeout":
            raise took_too_long(self._seconds)
        if isinstance(found, Lost):
            raise ToolUnavailable(f"tool {name!r}: {found.reason}")
        if "error" in found:
            raise (ToolUnavailable if found["infrastructure"] else Observed)(found["error"])
        return str(found["text"])

    def close(self) -> None:
        """Stop all processes."""
        self._pool.close()
        self._executor.shutdown(wait=False, cancel_futures=True)


def took_too_long(seconds: float) -> Observed:
    """Return what the policy reads of a call that was ended."""
    return Observed(f"took longer than {seconds:g} s and was ended")
