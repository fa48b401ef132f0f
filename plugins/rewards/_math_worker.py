"""The process in which `math_answer` parses model text, and its handle.

Parsing can take forever (`9^{9^{9^9}}`), eat all memory or crash the interpreter: it happens in a process that can be
killed. Math-Verify's own time limits are off: they use SIGALRM, which works in a main thread only. A plain subprocess
and not `multiprocessing`, which would import the user's main script again in every worker. This file runs by itself,
as a script, and imports nothing of the package.

Protocol: one JSON value per line. After start-up `{}` or `{"error": text}`; then per request `[completion, reference or
None, answer_after]` -> {"score": float or None, "answer": str or None}.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from typing import Any

MEMORY = 4 << 30
"""Bytes of address space a worker may use."""


class Worker:
    """One such process: started again after it was killed or died."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._ready = False
        self._start()

    def ask(self, completion: str, reference: str | None, answer_after: str | None) -> dict[str, Any] | str:
        """The reply, or a text that says why there is none: it took too long or killed the process."""
        if not self._ready:
            reply = self._exchange(None, 120.0)
            if reply is None or "error" in reply:
                self.close()
                raise RuntimeError(f"math-verify did not start: {(reply or {}).get('error', 'the process died')}")
            self._ready = True
        reply = self._exchange([completion, reference, answer_after], self.timeout)
        if reply is not None:
            return reply
        reason = f"took over {self.timeout:g} s" if self._killed else "crashed its process"
        self.close()
        self._start()
        return reason

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _start(self) -> None:
        command = [sys.executable, "-P", __file__, str(self.timeout)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8")
        self._ready = False

    def _exchange(self, request: list[Any] | None, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._killed = False
        timer = threading.Timer(seconds, self._kill)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def _kill(self) -> None:
        self._killed = True
        self._process.kill()


class Pool:
    """Workers that wait for requests from any thread."""

    def __init__(self, workers: int, timeout: float) -> None:
        self.idle: queue.Queue[Worker] = queue.Queue()
        for _ in range(workers):
            self.idle.put(Worker(timeout))

    def ask(self, completion: str, reference: str | None, answer_after: str | None) -> dict[str, Any] | str:
        worker = self.idle.get()
        try:
            return worker.ask(completion, reference, answer_after)
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        while not self.idle.empty():
            self.idle.get().close()


def serve(timeout: float) -> None:
    """Answer requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        import logging

        import math_verify  # noqa: F401

        logging.disable()
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    reply({})
    for line in open(0, encoding="utf-8", closefd=False):  # noqa: SIM115
        _limit(timeout)
        reply(judge(*json.loads(line)))


def judge(completion: str, reference: str | None, answer_after: str | None) -> dict[str, Any]:
    """Whether a completion's answer equals the reference; None where the reference cannot be parsed."""
    from math_verify import parse, verify

    if answer_after and answer_after in completion:
        completion = completion.rpartition(answer_after)[2]
    gold = [] if reference is None else parse(reference, parsing_timeout=None)
    if reference is not None and not gold:
        return {"score": None, "answer": None}
    found = parse(completion, parsing_timeout=None)
    score = float(verify(gold, found, timeout_seconds=None)) if gold else None
    return {"score": score, "answer": str(found[0]) if found else None}


def _limit(timeout: float) -> None:
    """Bound memory, and processor time so that a worker whose parent was killed ends by itself."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime + timeout) + 10
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    serve(float(sys.argv[1]))
