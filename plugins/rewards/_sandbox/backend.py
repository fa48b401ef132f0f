"""Execution of untrusted programs: the input and output of a sandbox, and the limits of the exchange.

A backend starts `sandbox_child` locally (`bubblewrap`, `engine`, `rlimits`) or asks another machine to (`remote`).
Expected values stay in this process: a sandbox gets a program with expressions and inputs, and its answers are untrusted
data. docs/sandbox.md lists what is guaranteed and what is not.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .sandbox_child import LIMITS, fields_of, joined

INSIDE = ("sandbox_confine", "sandbox_encode", "sandbox_child")
"""Modules that run inside the sandbox, in the order of their imports."""
GRACE = 0.7
"""Seconds beyond the time limit before a sandbox without an answer is killed."""
ERRORS = 16 << 10
"""Maximum bytes of standard error kept."""
MIB = 1 << 20


class SandboxError(RuntimeError):
    """Failure of the sandbox itself, so that the program was not scored. The message says how to fix it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a program."""

    seconds: float = 10.0
    """Wall-clock time for all tests of a program, and CPU time of each process."""
    test_seconds: float = 5.0
    """Wall-clock time for one test."""
    memory: int = 512 * MIB
    """Bytes of address space of each process."""
    processes: int = 8
    """Concurrent processes and threads."""
    disk: int = 32 * MIB
    """Bytes of the temporary folder."""
    files: int = 4096
    """Files and folders in it."""
    output: int = MIB
    """Bytes that all tests of a program may return."""


@dataclass(frozen=True)
class Question:
    """Query to a program: the value of an expression, or its output for a standard input."""

    kind: Literal["call", "stdin"]
    text: str


@dataclass(frozen=True)
class Answer:
    """Answer of a program: JSON of a value, its output, or a reason for failure."""

    kind: Literal["value", "stdout", "failed"]
    text: str


KINDS: dict[bytes, Literal["value", "stdout", "failed"]] = {b"v": "value", b"o": "stdout", b"f": "failed"}


class Backend(ABC):
    """Base class of ways to run a program in isolation."""

    @abstractmethod
    def problem(self) -> str | None:
        """Return why it cannot run here and how to fix that, or None if it can. Tried once per process."""

    @abstractmethod
    def run(self, code: str, questions: Sequence[Question], limits: Limits) -> list[Answer]:
        """Answer each question in one start of the sandbox. Raises `SandboxError` if the program was not run."""


def packed(code: str, questions: Sequence[Question], limits: Limits, *, nonce: str, **more: float) -> bytes:
    """Encode a job for the harness (see `sandbox_child`). `more`: deadline, user, and overridden limits."""
    numbers = {"deadline": 0.0, "user": -1, **vars(limits), **more}
    marks = {"call": b"c", "stdin": b"s"}
    tests = [marks[question.kind] + question.text.encode("utf-8", "surrogatepass") for question in questions]
    fields = [" ".join(repr(numbers[name]) for name in LIMITS).encode(), code.encode("utf-8", "surrogatepass"), *tests]
    job = joined(fields)
    return b"%012d" % len(job) + job + nonce.encode()


def unpacked(text: bytes, questions: Sequence[Question], nonce: str) -> list[Answer]:
    """Decode the harness's output. Raises `ValueError` unless it has exactly one answer per question."""
    given, *fields = fields_of(text)
    if not secrets.compare_digest(given, nonce.encode()):
        raise ValueError("another run's nonce")
    if len(fields) != len(questions):
        raise ValueError("not one answer per test")
    return [Answer(KINDS[field[:1]], field[1:].decode("utf-8", "replace")) for field in fields]


def failed(questions: Sequence[Question], reason: str) -> list[Answer]:
    """Return the same failure for every test."""
    return [Answer("failed", reason)] * len(questions)


def new_nonce() -> str:
    return secrets.token_hex(32)


def bootstrap(folder: str) -> str:
    """Return Python code that runs the harness from a folder with the modules of `INSIDE`, hidden from the program."""
    before = f"import sys; sys.path[:] = filter(None, sys.path); sys.path.append({folder!r}); "
    return before + f"import sandbox_child; sys.path.remove({folder!r}); sandbox_child.main()"


def carried() -> str:
    """Return Python code that contains the harness and needs no file."""
    here = Path(__file__).parent
    sources = {name: (here / f"{name}.py").read_text(encoding="utf-8") for name in INSIDE}
    return (
        f"import sys\nsys.path[:] = filter(None, sys.path)\nfor name, source in {sources!r}.items():\n"
        "    module = sys.modules[name] = type(sys)(name)\n    module.__package__ = ''\n"
        "    exec(compile(source, name + '.py', 'exec'), module.__dict__)\nmodule.main()\n"
    )


def exchange(
    process: subprocess.Popen[bytes],
    job: bytes,
    questions: Sequence[Question],
    *,
    nonce: str,
    seconds: float,
    output: int,
    kill: Callable[[], None],
) -> list[Answer]:
    """Send a started harness its job and read its answers within `seconds`; then kill it and its children.

    If the harness starts but gives no answer, its program killed it and all tests fail. Raises `SandboxError` if it did
    not start.
    """
    try:
        out, errors, in_time = _talk(process, job, time.monotonic() + seconds, output + 512 * len(questions) + 4096)
    finally:
        kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        process.wait()
    ready, _, answers = out.partition(b"ready\n")
    if ready or not out.startswith(b"ready\n"):
        reason = errors.decode("utf-8", "replace").strip() or f"ended with status {process.returncode}"
        raise SandboxError(f"the sandbox did not start within {seconds:g} s: {reason[-800:]}")
    try:
        return unpacked(answers, questions, nonce)
    except (ValueError, KeyError):
        if b"Traceback" in errors:
            raise SandboxError(f"the harness failed: {errors.decode('utf-8', 'replace')[-800:]}") from None
        return failed(questions, "ended the sandbox" if in_time else "took too long")


def _talk(process: subprocess.Popen[bytes], job: bytes, deadline: float, most: int) -> tuple[bytes, bytes, bool]:
    """Return standard output up to `most` bytes, standard error, and True if the output ended before the deadline."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    streams = selectors.DefaultSelector()
    os.set_blocking(process.stdin.fileno(), False)
    streams.register(process.stdin.fileno(), selectors.EVENT_WRITE)
    out, errors = bytearray(), bytearray()
    for stream in (process.stdout, process.stderr):
        streams.register(stream.fileno(), selectors.EVENT_READ)
    left = memoryview(job)
    with streams:
        while (seconds := deadline - time.monotonic()) > 0 and len(out) <= most:
            for key, _ in streams.select(seconds):
                if key.fd == process.stdin.fileno():
                    try:
                        left = left[os.write(key.fd, left[:65536]) :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        streams.unregister(key.fd)
                    continue
                chunk = os.read(key.fd, 65536)
                if key.fd == process.stdout.fileno():
                    out += chunk
                    if not chunk:
                        errors += _rest(process.stderr.fileno()) if len(errors) < ERRORS else b""
                        return bytes(out), bytes(errors), True
                elif chunk:
                    errors += chunk[: max(0, ERRORS - len(errors))]
                else:
                    streams.unregister(key.fd)
    return bytes(out), bytes(errors), False


def _rest(fd: int) -> bytes:
    """Read what is left in a pipe, without blocking."""
    os.set_blocking(fd, False)
    try:
        return os.read(fd, ERRORS)
    except BlockingIOError:
        return b""


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads its own group, with the group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
