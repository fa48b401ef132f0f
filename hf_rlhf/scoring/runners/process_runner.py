"""Runner in separate processes, started as plain interpreters, so that the caller's main script does not run again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cloudpickle

from hf_rlhf.batch import Context
from hf_rlhf.contract.base import Plugin, nested_of
from hf_rlhf.contract.reward_source import RewardSource
from hf_rlhf.scoring.answers import RewardError, RewardStartError
from hf_rlhf.scoring.runners.reward_call import CallResult, RewardCall
from hf_rlhf.scoring.runners.worker_pool import READY, Events, WorkerDied, WorkerPool, count_of

CHUNK = 8
"""Maximum rows sent to a process at a time."""
PATIENCE_S = 1.0
"""Seconds for an idle process to close its source."""


class Process:
    """Worker process of a source; `first` are the first frames that it reads."""

    def __init__(self, events: Events, label: str, source: RewardSource, first: list[bytes]) -> None:
        self._events, self._label, self._source = events, label, source
        self._sent = b""
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker_main.py"))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        self._said = ""
        self._listener = threading.Thread(target=self._listen, name="hf_rlhf-reward-process", daemon=True)
        self._listener.start()
        threading.Thread(target=self._wait, name="hf_rlhf-reward-process-end", daemon=True).start()
        for frame in first:
            self._write(frame)

    def send(self, state: bytes, units: list[RewardCall]) -> None:
        """Send units, and the state if it changed. Raises `RewardError` if a row cannot be pickled."""
        changed = state if state != self._sent else None
        self._sent = state
        try:
            frame = pickle.dumps((changed, units))
        except Exception as error:
            raise RewardError(
                f"reward {self._label!r}: cannot send a row to a process: {type(error).__name__}: {error}. Set "
                f"{self._source.override('workers=inline')}, or keep only plain data in the dataset's columns"
            ) from error
        self._write(frame)

    def stop(self, idle: bool = False) -> None:
        """Kill the process and its group; an idle one first gets `PATIENCE_S` to close its source."""
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
        with contextlib.suppress(OSError):  # it died; the listener reports it
            self._process.stdin.write(struct.pack("<Q", len(frame)) + frame)
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError), self._process.stdout as lines:
            for line in lines:
                reply = json.loads(line)
                if "broken" in reply:
                    self._said = f": {reply['broken']}"
                else:
                    self._events.put((self, READY if "ready" in reply else CallResult.from_json(reply)))

    def _wait(self) -> None:
        """Report its exit, after all its output: a child may hold the pipe open, so the end of output does not count."""
        code = self._process.wait()
        self._listener.join(1.0)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._events.put((self, WorkerDied(f"its process ended {how}{self._said}")))


def fresh(source: RewardSource) -> RewardSource:
    """Return a source with the same settings that is not set up."""
    return type(source)(
        **{field.name: getattr(source, field.name) for field in dataclasses.fields(source) if field.init}
    )


def packed(label: str, source: RewardSource, context: Context | None) -> bytes:
    """Pickle the parts from which a worker builds its source. Raises `RewardError` if they cannot be pickled."""
    needs_setup = any(type(each).setup is not Plugin.setup for each in (source, *nested_of(source)))
    own = fresh(source)
    own.label, own.recipe_path = label, source.recipe_path
    module = sys.modules.get(type(source).__module__)
    file = getattr(module, "__file__", None)
    given: dict[str, Any] = {"label": label, "source": own, "setup": needs_setup, "context": {"tokenizer": None}}
    if needs_setup and context is not None:
        names = ("tokenizer", "seed", "chat_template_kwargs")
        given["context"] = {name: getattr(context, name) for name in names}
    try:
        body = cloudpickle.dumps(given)
    except Exception as error:
        raise RewardStartError(
            f"reward {label!r}: cannot send it to {source.workers}: {type(error).__name__}: {error}. Name its function "
            f"as file.py:name, or set {source.override('workers=inline')}"
        ) from error
    return pickle.dumps({"path": sys.path, "module": (type(source).__module__, file), "body": body})


def processes(label: str, source: RewardSource, context: Context | None, requests: int = 1) -> WorkerPool:
    """Create a pool of processes."""
    header = json.dumps({"path": sys.path, "memory_mib": source.memory_mib, "timeout": source.timeout}).encode()
    first = [header, packed(label, source, context)]
    return WorkerPool(
        label,
        source,
        lambda events: Process(events, label, source, first),
        count=count_of(source, requests),
        chunk=CHUNK,
    )
