"""Script that runs a program against its tests inside a sandbox. It imports nothing from the package.

There are two kinds of processes. The harness (this script's first process) reads the job, starts the program and returns
its answers; it executes no code of the program. Programs run in processes forked from it, under limits that they cannot
lift, without the harness's pipes and, if the sandbox supports it, as another user. Neither has the expected values.

Standard input: 12 digits, the length of the job; the job, fields as `LENGTH:BYTES`; 64 characters, the nonce, which the
harness reads once no program runs any more. The job's fields: `LIMITS` in order as numbers, the program, then per test
"c" and an expression, or "s" and a text for standard input.
Standard output: "ready\\n"; then fields as above: the nonce, and per test "v" and its value as JSON (see `encode`), "o"
and its output, or "f" and the reason for failure.
"""

from __future__ import annotations

import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

try:  # importing `signal`, which wraps these, would take a quarter of Python's start-up time
    from _signal import ITIMER_REAL, setitimer
except ImportError:
    from signal import ITIMER_REAL, setitimer

if __package__:
    from .sandbox_confine import Bounds, confine, die_with_parent, harden, sweep
    from .sandbox_encode import NotPlain, encode
else:
    from sandbox_confine import Bounds, confine, die_with_parent, harden, sweep  # type: ignore[no-redef]
    from sandbox_encode import NotPlain, encode  # type: ignore[no-redef]

LIMITS = ("deadline", "seconds", "test_seconds", "memory", "processes", "disk", "files", "output", "user")
"""Deadline in seconds of the monotonic clock, 0 if the parent has another clock; seconds in total and per test; bytes of
address space of each process; processes; bytes and files of the temporary folder; total bytes returned; user and group
of the program, -1 for the harness's own."""
LAST = b"\nend\n"
"""Marker after a program's last answer."""

_now, _fork, _write, _read = time.monotonic, os.fork, os.write, os.read


def _start(job: Job, standard_input: int, standard_output: int, kept: int) -> int:
    """Fork; returns 0 in the child, which is confined and keeps only these three of this process's files."""
    pid = _fork()
    if pid:
        return pid
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for place, fd in enumerate((standard_input, standard_output, null)):
        os.dup2(fd if fd >= 0 else null, place)
    os.closerange(3, max(3, kept))
    os.closerange(max(2, kept) + 1, os.sysconf("SC_OPEN_MAX"))
    confine(job)
    import builtins

    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    return 0


# Tests that are expressions: one process runs the program, a forked copy each test


def run_calls(job: Job, calls: list[tuple[int, str]], left: int) -> dict[int, bytes]:
    """Return "v" and JSON or "f" and a reason by index, for each expression that was answered; at most `left` bytes."""
    reader, writer = os.pipe()
    pid = _start(job, -1, -1, writer)
    if not pid:
        try:
            _answer_calls(job, calls, writer)
        finally:
            os._exit(0)
    os.close(writer)
    frames = bytearray()
    for chunk in _chunks(reader, job.deadline, pid):
        frames += chunk
        if len(frames) > left + 256 * len(calls) or frames.endswith(LAST):
            break
    os.close(reader)
    sweep(pid)
    return _frames(bytes(frames), {index for index, _ in calls})


def _answer_calls(job: Job, calls: list[tuple[int, str]], writer: int) -> None:
    module = type(sys)("solution")
    sys.modules["solution"] = module
    scope = module.__dict__
    try:
        exec(compile(job.code, "solution.py", "exec", dont_inherit=True), scope)  # noqa: S102  (inside the sandbox)
    except SystemExit:
        pass
    except BaseException as error:
        for index, _ in calls:
            _send(writer, index, b"f", _raised(error))
        _write(writer, LAST)
        return
    for index, call in calls:
        pid = _fork()
        if not pid:
            try:
                _answer_call(job, index, call, scope, writer)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    _write(writer, LAST)


def _answer_call(job: Job, index: int, call: str, scope: dict[str, Any], writer: int) -> None:
    die_with_parent()
    setitimer(ITIMER_REAL, job.test_seconds)  # its signal kills the process
    try:
        value = eval(compile(call, "test.py", "eval", dont_inherit=True), scope)  # noqa: S307  (inside the sandbox)
        kind, text = b"v", encode(value, job.output).encode("ascii")
    except NotPlain as error:
        kind, text = b"f", str(error)[:60].encode("utf-8", "replace")
    except BaseException as error:
        kind, text = b"f", _raised(error)
    _send(writer, index, kind, text)


def _raised(error: BaseException) -> bytes:
    return f"raised {type(error).__name__}"[:60].encode("utf-8", "replace")


def _send(fd: int, index: int, kind: bytes, text: bytes) -> None:
    whole = b"%d %d\n" % (index, len(kind + text)) + kind + text
    while whole:
        whole = whole[_write(fd, whole) :]


def _frames(text: bytes, expected: set[int]) -> dict[int, bytes]:
    """Parse a program's answers up to the first malformed one. The first answer to a test counts."""
    found: dict[int, bytes] = {}
    place = 0
    while (end := text.find(b"\n", place, place + 32)) >= 0:
        index, _, length = text[place:end].partition(b" ")
        if not (index.isdigit() and length.isdigit()):
            break
        place = end + 1 + int(length)
        if place > len(text) or int(index) not in expected:
            break
        found.setdefault(int(index), text[end + 1 : place])
    return found


# Tests that are whole runs


def run_whole(job: Job, given: bytes, left: int) -> bytes:
    """Return "o" and the program's output, or "f" and a reason."""
    in_reader, in_writer = os.pipe()
    reader, writer = os.pipe()
    pid = _start(job, in_reader, writer, -1)
    if not pid:
        _run_as_main(job.code)
    os.close(in_reader)
    os.close(writer)
    printed = bytearray()
    deadline = min(job.deadline, _now() + job.test_seconds)
    status: int | None = None
    for chunk in _chunks(reader, deadline, pid, in_writer, given):
        printed += chunk
        if len(printed) > left:
            break
        if not chunk:
            status = _wait(pid, deadline)
    os.close(reader)
    sweep(pid)
    if len(printed) > left:
        return b"ftoo much output"
    if status is None:
        return b"ftook too long"
    return b"o" + bytes(printed) if status == 0 else b"fended with status %d" % status


def _run_as_main(code: str) -> None:
    """Run a program as `__main__` and exit as it would, but faster if it has no threads or exit handlers to wait for."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(code, "solution.py", "exec", dont_inherit=True), module.__dict__)  # noqa: S102  (inside the sandbox)
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            raise
    if "threading" in sys.modules or "atexit" in sys.modules:
        sys.exit()
    module.__dict__.clear()  # files that it left open are closed
    sys.stdout.flush()
    os._exit(0)


def _wait(pid: int, deadline: float) -> int | None:
    """Wait for a child; returns its exit status, negative for a signal, or None at the deadline."""
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if _now() > deadline:
            return None
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(found[1])


def _chunks(reader: int, deadline: float, pid: int, writer: int = -1, given: bytes = b"") -> Iterator[bytes]:
    """Read until the deadline while writing `given`; yields b"" last if the other end is closed or its process gone."""
    ended = False
    if writer >= 0:
        os.set_blocking(writer, False)
    try:
        while (left := deadline - _now()) > 0:
            ready, free, _ = select.select([reader], [writer] if writer >= 0 else [], [], min(left, 0.05))
            if free:
                try:
                    given = given[_write(writer, given[:65536]) :]
                except BrokenPipeError:
                    given = b""
                if not given:
                    os.close(writer)
                    writer = -1
            if ready:
                chunk = _read(reader, 65536)
                yield chunk
                if not chunk:
                    break
            elif ended:
                yield b""  # a leftover process holds the pipe open
                break
            elif not free:
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    finally:
        if writer >= 0:
            os.close(writer)


# The harness


class Job(Bounds):
    """Program, tests and limits of a run."""

    deadline: float
    test_seconds: float
    output: int

    def __init__(self, fields: list[bytes]) -> None:
        limits, code, *tests = fields
        for name, value in zip(LIMITS, limits.split(), strict=True):
            setattr(self, name, float(value) if name in LIMITS[:3] else int(value))
        self.deadline = self.deadline or _now() + self.seconds
        self.code = code.decode("utf-8", "surrogatepass")
        self.tests = [(test[:1], test[1:]) for test in tests]


def run(job: Job) -> list[bytes]:
    """Return one field per test, as described in the module docstring."""
    answers: dict[int, bytes] = {}
    left = job.output
    calls = [
        (index, text.decode("utf-8", "surrogatepass")) for index, (kind, text) in enumerate(job.tests) if kind == b"c"
    ]
    if calls:
        answers = run_calls(job, calls, left)
        left -= sum(map(len, answers.values()))
    for index, (kind, text) in enumerate(job.tests):
        if kind == b"s" and left > 0 and _now() < job.deadline:
            answers[index] = run_whole(job, text, left)
            left -= len(answers[index])
    return [answers.get(index, b"fno answer") for index in range(len(job.tests))]


def take(count: int) -> bytes:
    """Read exactly `count` bytes of standard input."""
    parts = bytearray()
    while len(parts) < count:
        chunk = _read(0, count - len(parts))
        if not chunk:
            raise EOFError
        parts += chunk
    return bytes(parts)


def fields_of(text: bytes) -> list[bytes]:
    """Parse consecutive fields `LENGTH:BYTES`. Raises `ValueError`."""
    found, place = [], 0
    while place < len(text):
        colon = text.index(b":", place, place + 12)
        end = colon + 1 + int(text[place:colon])
        if end > len(text) or end <= colon:
            raise ValueError("truncated field")
        found.append(text[colon + 1 : end])
        place = end
    return found


def joined(fields: list[bytes]) -> bytes:
    return b"".join(b"%d:" % len(field) + field for field in fields)


def main() -> None:
    """Run one job."""
    job = Job(fields_of(take(int(take(12)))))
    out = os.dup(1)
    harden(job)
    _write(out, b"ready\n")
    answers = run(job)
    whole = joined([take(64), *answers])
    while whole:
        whole = whole[_write(out, whole) :]
    os._exit(0)


if __name__ == "__main__":
    main()
