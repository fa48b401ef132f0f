"""Worker process: frames of bytes in, lines of JSON out.

The first frame is JSON with import paths, limits and the class that runs units, the second what that class is made of, then
one per chunk of units: (state or None, units). The output is {"ready": true} or {"broken": text}, then for each chunk
{"ready": true} once it is read, and one result per unit. A unit may write {"ask": question} and read a frame with the answer.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import time
from typing import Any, BinaryIO

GRACE_S = 2
"""Seconds before a process exits by itself, after a time limit or when its parent is gone."""


def frame(stream: BinaryIO) -> bytes | None:
    """Read the next frame; returns None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    body = stream.read(struct.unpack("<Q", head)[0])
    return body if body else None


def private_pipes() -> tuple[BinaryIO, Any]:
    """Return the pipes for frames and lines, separate from the source's standard streams."""
    frames = os.fdopen(os.dup(0), "rb")
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return frames, lines


def limit_memory(mib: int | None) -> None:
    """Limit the address space, if the system supports it."""
    if mib is None:
        return
    try:
        import resource
    except ImportError:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = mib << 20 if hard == resource.RLIM_INFINITY else min(mib << 20, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main() -> None:
    """Serve until the input ends."""
    frames, lines = private_pipes()

    def say(value: dict[str, Any]) -> None:
        lines.write(json.dumps(value, default=str) + "\n")
        lines.flush()

    header = json.loads(frame(frames) or b"{}")
    body = frame(frames)
    if body is None:
        return
    sys.path[:] = header["path"]
    try:
        from hf_rlhf.runtime.plain_text import PlainStream, clean_all_logs

        clean_all_logs()
        sys.stdout = sys.stderr = PlainStream(sys.stderr)
        limit_memory(header["memory_mib"])
        module, _, name = header["server"].partition(":")
        served = getattr(importlib.import_module(module), name)(body)
    except BaseException as error:
        say({"broken": f"{type(error).__name__}: {error}"})
        raise
    say({"ready": True})
    chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=receive, args=(frames, chunks), daemon=True).start()

    def ask(question: Any) -> Any:
        arm(None)
        say({"ask": question})
        answer = chunks.get()
        if answer is None:
            raise SystemExit("nobody is left to ask")
        arm(header["timeout"])
        return pickle.loads(answer)  # noqa: S301  (from the parent)

    while (chunk := chunks.get()) is not None:
        state, units = pickle.loads(chunk)  # noqa: S301  (from the parent)
        say({"ready": True})
        for unit in units:
            arm(header["timeout"])
            outcome = served.run(state, unit, ask)
            arm(None)
            state = None
            say(outcome)
    served.close()


def receive(frames: BinaryIO, chunks: queue.SimpleQueue[bytes | None]) -> None:
    """Forward frames. Once the sender is gone, kill the process group if a call takes longer than `GRACE_S`."""
    while True:
        chunk = frame(frames)
        chunks.put(chunk)
        if chunk is None:
            time.sleep(GRACE_S)
            if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
                os.killpg(0, signal.SIGKILL)
            os._exit(1)


def arm(seconds: float | None) -> None:
    """Let the system kill this process some seconds after a time limit, in case its parent is gone."""
    if hasattr(signal, "alarm"):
        signal.alarm(0 if seconds is None else int(seconds) + GRACE_S)


if __name__ == "__main__":
    main()
