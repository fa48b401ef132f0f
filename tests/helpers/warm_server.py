"""Start Python programs by forking a process that has imported torch and transformers: 0.1 s of work in place of 5 s.

`python warm_server.py SOCKET` listens until its standard input ends. `warm_client.py` asks it for a program and stands in
for it: same standard streams, folder, environment, signals and exit code. Neither imports anything of the tests.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import site
import socket
import sys
from typing import Any

IMPORTED = (
    *("torch", "transformers", "accelerate", "datasets", "pyarrow.parquet", "pydantic", "typer", "yaml"),
    *("transformers.trainer", "transformers.models.llama.modeling_llama", "transformers.generation.utils"),
)
"""What programs import and what reads no variable that they set."""


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return what a client asks for, and its standard streams."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size, text = int.from_bytes(head, "big"), b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    return json.loads(text), streams


def keep(connection: socket.socket, program: int) -> None:
    """Wait for a program, end it where its client is gone, forward signals, and send its exit status."""
    ended = os.pidfd_open(program)
    while True:
        ready, _, _ = select.select([ended, connection], [], [])
        if ended in ready:
            _, status = os.waitpid(program, 0)
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
            return
        signals = connection.recv(64)
        for number in signals or [signal.SIGKILL]:
            os.kill(program, number)
        if not signals:
            return


def serve(path: str) -> tuple[dict[str, Any], list[int]] | None:
    """Serve until standard input ends. Returns what is asked for, in each process that is to become the program."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return None
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                continue
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            asked, streams = receive(connection)
            program = os.fork()
            if program:
                for stream in streams:
                    os.close(stream)
                os.dup2(os.open(os.devnull, os.O_RDWR), 1)
                keep(connection, program)
                os._exit(0)
            connection.close()
            return asked, streams


def become(asked: dict[str, Any], streams: list[int]) -> None:
    """Run a module, or `-c` code, as Python does, in the place that is asked for."""
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0)
    encoding = os.environ.get("PYTHONIOENCODING") or None
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, encoding=encoding)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    here = [] if os.environ.get("PYTHONSAFEPATH") else [asked["folder"]]
    sys.path[:0] = [*here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for folder in site.getsitepackages():  # packages that were installed after the server started
        site.addsitedir(folder)
    importlib.invalidate_caches()
    module, *words = asked["words"]
    if module == "-c":
        code, sys.argv = words[0], ["-c", *words[1:]]
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Import, serve, and become what is asked for."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    found = serve(sys.argv[1])
    if found:
        become(*found)


if __name__ == "__main__":
    main()
