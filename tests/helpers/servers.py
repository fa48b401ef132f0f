"""Small HTTP servers on 127.0.0.1 whose answers a test makes, and `hf-rlhf serve-reward` as a process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from tests.helpers.paths import ROOT
from tests.helpers.processes import free_port, warm
from tests.helpers.waits import scaled, until

ENVIRONMENT = {name: x for name, x in os.environ.items() if not name.lower().endswith("_proxy")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Raw:
    """An answer that is not simply 200 with JSON. `drop`: the connection is closed without one."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    drip: float = 0.0
    """Seconds between the bytes."""


@dataclass(frozen=True)
class Request:
    """What a server got."""

    path: str
    headers: dict[str, str]
    body: Any
    at: float


class Server:
    """Answers POST number i with `reply(body, i)`: a JSON value, or `Raw`; and GET with what `pages` has for its path."""

    def __init__(self, reply: Callable[[Any, int], Any], port: int = 0, pages: dict[str, Any] | None = None) -> None:
        self.requests: list[Request] = []
        self.pages = pages or {}
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                answer = json.dumps(server.pages.get(path)).encode()
                self.send_response(200 if path in server.pages else 404)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    server.requests.append(Request(self.path, headers, body, time.monotonic()))
                answer = reply(body, number)
                if not isinstance(answer, Raw):
                    answer = Raw(json.dumps(answer).encode())
                if answer.drop:
                    self.close_connection = True
                    return
                with contextlib.suppress(OSError):
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(answer.body)))
                    self.end_headers()
                    for start in range(len(answer.body)) if answer.drip else [0]:
                        time.sleep(answer.drip)
                        self.wfile.write(answer.body[start : start + 1] if answer.drip else answer.body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


def start_serving(*words: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """`hf-rlhf serve-reward WORDS` in a process."""
    command = [*warm("hf_rlhf"), "serve-reward", *words]
    env = {**ENVIRONMENT, **(environment or {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=env,
        cwd=ROOT,
    )


def until_serving(url: str, process: subprocess.Popen[str], headers: dict[str, str] | None = None) -> None:
    """Waits until /health answers."""

    def answers() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}: {process.communicate()[1]}")
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/health", headers=headers, timeout=scaled(5), trust_env=False)
            return True
        return False

    until(answers, 90, pause=0.05, what="no answer of the server")


@contextlib.contextmanager
def serving(*words: str, environment: dict[str, str] | None = None, headers: Any = None) -> Iterator[str]:
    """The URL of `hf-rlhf serve-reward WORDS` while it runs."""
    port = free_port()
    process = start_serving(*words, "--port", str(port), environment=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        until_serving(url, process, headers)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=scaled(30))
