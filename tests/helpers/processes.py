"""Programs in processes of their own, which start warm: forked from one process that has imported torch."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.helpers.paths import OUTSIDE, environment
from tests.helpers.waits import scaled

HERE = Path(__file__).parent


@cache
def _server(python: str) -> tuple[Path, subprocess.Popen[str]]:
    """The socket of the process that others are forked from; it ends with this one, whose end closes its input."""
    path = Path(tempfile.mkdtemp(prefix="warm-")) / "socket"
    variables = environment(HF_HUB_OFFLINE="1") if python == sys.executable else {**OUTSIDE, "HF_HUB_OFFLINE": "1"}
    words, pipe = [python, "-P", str(HERE / "warm_server.py"), str(path)], subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=variables, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return path, process


def warm(module: str, python: str = sys.executable) -> list[str]:
    """Return the words that run a module as `python -m` does, or code after "-c", with torch and transformers there.

    HF_HUB_OFFLINE and OMP_NUM_THREADS are 1 in it, whatever the environment says.
    """
    return [python, "-I", "-S", str(HERE / "warm_client.py"), str(_server(python)[0]), module]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ranks(count: int = 2) -> list[dict[str, str]]:
    """Return the variables of each of `count` processes that train together on this machine."""
    both = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**both, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run_ranks(code: str) -> list[str]:
    """Run code in two processes that train together. Returns what each printed."""
    words, pipe = [*warm("-c"), code], subprocess.PIPE
    return ended_well(
        [subprocess.Popen(words, env=environment(**rank), stdout=pipe, stderr=pipe, text=True) for rank in ranks()]
    )


def ended_well(started: list[subprocess.Popen[str]], seconds: float = 300.0) -> list[str]:
    """Wait for processes whose output is a pipe. Returns what each printed, after all ended with exit code 0."""
    try:
        printed = ["\n".join(filter(None, process.communicate(timeout=scaled(seconds)))) for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [0] * len(codes), f"exit codes {codes}\n" + "\n".join(text[-3000:] for text in printed)
    return printed
