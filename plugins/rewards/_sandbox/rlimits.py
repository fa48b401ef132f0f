"""Limits on CPU time, memory, files and processes only: hygiene for trusted code, not a sandbox.

The program can read and write whatever this process can, and reach the network. Run by root, its processes are not
counted, and it can kill this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .backend import (
    GRACE,
    Answer,
    Backend,
    Limits,
    Question,
    SandboxError,
    bootstrap,
    exchange,
    kill_group,
    new_nonce,
    packed,
)
from .bubblewrap import interpreter


class Rlimits(Backend):
    """Backend that runs a process with resource limits in a temporary folder."""

    def __init__(self, python: str | None = None) -> None:
        self.python = python

    def problem(self) -> str | None:
        if os.name != "posix":
            return "sandbox `rlimits`: this system has no resource limits. Set `sandbox` to docker or remote"
        return None

    def run(self, code: str, questions: Sequence[Question], limits: Limits) -> list[Answer]:
        begin, nonce = time.monotonic(), new_nonce()
        job = packed(
            code,
            questions,
            limits,
            nonce=nonce,
            deadline=begin + limits.seconds,
            files=0,
            processes=0,  # the limit counts all processes of the user
        )
        python = interpreter(self.python)
        flags = ["-s", "-B", *([] if python.packages else ["-S"]), "-X", "utf8"]
        with tempfile.TemporaryDirectory(prefix="unit_tests_") as folder:
            try:
                process = subprocess.Popen(
                    [python.executable, *flags, "-c", bootstrap(str(Path(__file__).parent))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"},
                    cwd=folder,
                    start_new_session=True,
                )
            except OSError as error:
                raise SandboxError(f"{sys.executable} does not start: {error}") from error
            return exchange(
                process,
                job,
                questions,
                nonce=nonce,
                seconds=limits.seconds + GRACE,
                output=limits.output,
                kill=lambda: kill_group(process),
            )
