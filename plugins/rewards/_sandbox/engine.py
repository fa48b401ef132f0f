"""Docker or Podman: a container per program, without network or capabilities, with a read-only root."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from typing import Literal

from .backend import (
    Answer,
    Backend,
    Limits,
    Question,
    SandboxError,
    carried,
    exchange,
    kill_group,
    new_nonce,
    packed,
)

IMAGE = "python:3.12-slim"
STARTING = 30.0
"""Seconds that an engine may take to start a container, beyond the program's time."""
MIB = 1 << 20


class Engine(Backend):
    """Backend that starts `docker run` or `podman run` once per program. The image needs only `python3`, 3.11 or newer."""

    def __init__(self, engine: Literal["docker", "podman"], image: str | None = None) -> None:
        self.engine = engine
        self.image = image or IMAGE

    def problem(self) -> str | None:
        return _problem(self.engine, self.image)

    def command(self, limits: Limits, name: str) -> list[str]:
        """Return the command. Limits on memory and processes apply to the whole container."""
        total = f"{(limits.memory * limits.processes + limits.disk) // MIB + 64}m"
        room = f"/tmp:rw,nosuid,nodev,mode=1777,size={limits.disk}"
        if self.engine == "docker":  # podman rejects it; there, files count as memory
            room += f",nr_inodes={limits.files}"
        return [
            *[self.engine, "run", "--rm", "--interactive", "--pull", "never", "--name", name],
            *["--network", "none", "--read-only", "--tmpfs", room, "--workdir", "/tmp"],
            *["--user", "65534:65534", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"],
            *["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096", "--ulimit", "core=1:1"],
            *["--memory", total, "--memory-swap", total, "--pids-limit", str(limits.processes + 2)],
            *["--env", "HOME=/tmp", "--env", "PYTHONHASHSEED=0", "--env", "OMP_NUM_THREADS=1"],
            *["--log-driver", "none", "--entrypoint", "python3"],
            *[self.image, "-s", "-B", "-X", "utf8", "-c", carried()],
        ]

    def run(self, code: str, questions: Sequence[Question], limits: Limits) -> list[Answer]:
        nonce = new_nonce()
        name = f"unit_tests_{nonce[:24]}"
        begin = time.monotonic()
        job = packed(code, questions, limits, nonce=nonce, files=0, processes=0)
        try:
            process = subprocess.Popen(
                self.command(limits, name),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"{self.engine} does not start: {error}") from error
        return exchange(
            process,
            job,
            questions,
            nonce=nonce,
            seconds=limits.seconds + STARTING + begin - time.monotonic(),
            output=limits.output,
            kill=lambda: self._kill(process, name),
        )

    def _kill(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Kill the container too, which is a child of the engine, not of the command."""
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            _ask([self.engine, "rm", "--force", name])
        kill_group(process)


@cache
def _problem(engine: str, image: str) -> str | None:
    remedy = "or set `sandbox` to bubblewrap or remote"
    if shutil.which(engine) is None:
        return f"sandbox `{engine}`: command {engine} not found: install it, {remedy}"
    said = _ask([engine, "info"])
    if said is not None:
        return f"sandbox `{engine}`: the engine does not answer ({said}): start it, {remedy}"
    said = _ask([engine, "image", "inspect", image])
    if said is not None:
        return f"sandbox `{engine}`: image {image!r} not found ({said}): run `{engine} pull {image}`, or set another `image`"
    try:
        answers = Engine(engine, image).run("x = 6", [Question("call", "x * 7")], Limits())  # type: ignore[arg-type]
    except SandboxError as error:
        return f"sandbox `{engine}`: {error}; {remedy}"
    if answers != [Answer("value", "42")]:
        return f"sandbox `{engine}`: a trial program returned {answers[0].text!r} instead of 42; fix it, {remedy}"
    return None


def _ask(command: list[str]) -> str | None:
    """Run a command for up to 20 s; returns its output if it fails, else None."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, text=True, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return None if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip())[-300:]
