"""Processes that run tools, so that one that blocks can be ended: plain interpreters, which do not run the main script again."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle

from ._calls import Observed, ToolUnavailable

START_S = 120.0
"""Seconds for a process to load the tools."""


class ToolError(Observed):
    """Raised for an error of a tool in its process."""


class ToolTimeout(Observed):
    """Raised for a tool that was ended."""


class Worker:
    """One process. It runs one call at a time."""

    def __init__(self, functions: Mapping[str, str | Callable[..., Any]]) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("_worker_main.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._rest = b""
        given = {name: _sent(function) for name, function in functions.items()}
        try:
            self._write({"path": sys.path, "functions": given})
            reply = self._read(START_S)
        except (ToolTimeout, OSError, EOFError) as error:
            self.stop()
            raise ToolUnavailable(f"the process of the tools did not start: {error}") from error
        if "broken" in reply:
            self.stop()
            raise ToolUnavailable(f"the process of the tools cannot load them: {reply['broken']}")

    def call(self, name: str, arguments: Mapping[str, Any], seconds: float) -> str:
        """Run a tool. Raises `ToolTimeout`, `ToolError`, or `ToolUnavailable` if the process or what it needs is gone."""
        try:
            self._write([name, dict(arguments)])
            reply = self._read(seconds)
        except (OSError, EOFError) as error:
            raise ToolUnavailable(f"the process of the tool {name!r} ended: {error}") from error
        if "error" not in reply:
            return str(reply["text"])
        raise (ToolUnavailable if reply["infrastructure"] else ToolError)(reply["error"])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Kill the process and its group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert stream is not None
                stream.close()

    def _write(self, value: Any) -> None:
        assert self._process.stdin is not None
        body = json.dumps(value).encode()
        self._process.stdin.write(struct.pack("<Q", len(body)) + body)
        self._process.stdin.flush()

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise ToolTimeout(f"took longer than {seconds:g} s and was ended")
            if not (chunk := os.read(self._process.stdout.fileno(), 1 << 16)):
                raise EOFError(f"exit status {self._process.wait()}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply


class Workers:
    """A pool of processes, started as calls come."""

    def __init__(self, functions: Mapping[str, str | Callable[..., Any]], count: int, seconds: float) -> None:
        self._functions, self._seconds = functions, seconds
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="hf_rlhf-tools")
        self._started: set[Worker] = set()
        for _ in range(count):
            self._idle.put(None)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Run a tool in an idle process. Raises as `Worker.call`."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._call, name, arguments)

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive:
                worker = Worker(self._functions)
                self._started.add(worker)
            return worker.call(name, arguments, self._seconds)
        except (ToolTimeout, ToolUnavailable) as error:
            if worker is not None and (isinstance(error, ToolTimeout) or not worker.alive):
                worker.stop()
                worker = None
            raise
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill all processes."""
        for worker in self._started:
            worker.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)


def _sent(function: str | Callable[..., Any]) -> tuple[str, str]:
    if isinstance(function, str):
        return "path", function
    return "pickle", base64.b64encode(cloudpickle.dumps(function)).decode()
