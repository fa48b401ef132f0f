"""Worker processes, started as plain interpreters, so that the caller's main script does not run again."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_rlhf.runtime.worker_pool import READY, Events, WorkerAsks, WorkerDied

PATIENCE_S = 1.0
"""Seconds for an idle process to close what it runs."""


class Process:
    """Worker process. `first` are the first frames that it reads, `read` makes a result of its output, which is JSON."""

    def __init__(self, events: Events, first: list[bytes], read: Callable[[dict[str, Any]], Any]) -> None:
        self._events, self._read, self._sent = events, read, b""
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker_main.py"))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        self._said = ""
        self._listener = threading.Thread(target=self._listen, name="hf_rlhf-worker", daemon=True)
        self._listener.start()
        threading.Thread(target=self._wait, name="hf_rlhf-worker-end", daemon=True).start()
        for frame in first:
            self._write(frame)

    def send(self, state: bytes, units: list[Any]) -> None:
        """Send units, and the state if it changed. Raises what pickle raises for a unit that it cannot write."""
        frame = pickle.dumps((state if state != self._sent else None, units))
        self._sent = state
        self._write(frame)

    def reply(self, value: Any) -> None:
        """Answer a question of the unit that it runs."""
        self._write(pickle.dumps(value))

    def stop(self, idle: bool = False) -> None:
        """Kill the process and its group; an idle one first gets `PATIENCE_S` to close what it runs."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if idle:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def _write(self, frame: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it died or was stopped; the listener reports it
            self._process.stdin.write(struct.pack("<Q", len(frame)) + frame)
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError), self._process.stdout as lines:
            for line in lines:
                reply = json.loads(line)
                if "broken" in reply:
                    self._said = f": {reply['broken']}"
                elif "ask" in reply:
                    self._events.put((self, WorkerAsks(reply["ask"])))
                else:
                    self._events.put((self, READY if "ready" in reply else self._read(reply)))

    def _wait(self) -> None:
        """Report its exit, after all its output: a child may hold the pipe open, so the end of output does not count."""
        code = self._process.wait()
        self._listener.join(1.0)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._events.put((self, WorkerDied(f"its process ended {how}{self._said}")))


def worker_processes(
    server: str,
    body: bytes,
    *,
    timeout: float | None = None,
    memory_mib: int | None = None,
    read: Callable[[dict[str, Any]], Any] | None = None,
) -> Callable[[Events], Process]:
    """Return the `start` of a `WorkerPool` whose units are run by a class in processes.

    `server` names the class as `module:Class`. A process makes one of `body`, calls its `run(state, unit, ask)` for each unit,
    and its `close` at the end. `run` returns a mapping that JSON can hold; `ask(question)` asks the listener of the unit.
    `timeout`: seconds of a unit after which a process ends by itself in case nobody is left to end it.
    """
    header = {"path": sys.path, "memory_mib": memory_mib, "timeout": timeout, "server": server}
    first = [json.dumps(header).encode(), body]
    return lambda events: Process(events, first, read or dict)
