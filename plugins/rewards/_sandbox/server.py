"""Runner for `sandbox: remote`, which runs the programs it receives under Bubblewrap.

    UNIT_TESTS_TOKEN=... python -m hf_rlhf_plugins.rewards._sandbox.server --host 0.0.0.0 --port 8900

It has no data, model or expected values: run it on a separate, disposable machine.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .backend import Backend, Limits, Question, SandboxError
from .bubblewrap import Bubblewrap
from .remote import BOUNDS, VERSION

LARGEST = 16 << 20
"""Maximum bytes of a request."""
HIGHEST = Limits(
    seconds=120.0,
    test_seconds=120.0,
    memory=4 << 30,
    processes=64,
    disk=1 << 30,
    files=1 << 16,
    output=16 << 20,
)
"""Upper bounds of a request's limits."""


class Refused(Exception):
    """Error for a rejected request; the message says why."""


def answer(asked: Any, backend: Backend) -> dict[str, Any]:
    """Answer a request. Raises `Refused`, and `SandboxError` if the sandbox does not start."""
    if not isinstance(asked, dict) or asked.get("version") != VERSION:
        got = asked.get("version") if isinstance(asked, dict) else asked
        raise Refused(f"this server speaks protocol version {VERSION}, got {got!r:.80}")
    code, tests, bounds = asked.get("code"), asked.get("tests"), asked.get("limits", {})
    if not isinstance(code, str) or not isinstance(tests, list) or not isinstance(bounds, dict):
        raise Refused("code must be a text, tests a list and limits an object")
    results = backend.run(code, [_question(test) for test in tests], _limits(bounds))
    return {"version": VERSION, "nonce": asked.get("nonce"), "results": [{each.kind: each.text} for each in results]}


def _question(test: Any) -> Question:
    match test:
        case {"call": str(text)}:
            return Question("call", text)
        case {"stdin": str(text)}:
            return Question("stdin", text)
    raise Refused('each test must be {"call": EXPRESSION} or {"stdin": TEXT}')


def _limits(bounds: dict[str, Any]) -> Limits:
    unknown = set(bounds) - set(BOUNDS)
    if unknown:
        raise Refused(f"unknown limits {', '.join(sorted(unknown))}; use {', '.join(BOUNDS)}")
    found: dict[str, Any] = {}
    for name, value in bounds.items():
        highest = getattr(HIGHEST, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise Refused(f"limits: {name} must be a positive number")
        found[name] = type(highest)(min(value, highest))
    return replace(Limits(), **found)


def serve(host: str, port: int, token: str | None, at_a_time: int, backend: Backend) -> ThreadingHTTPServer:
    """Return a listening server, started by `serve_forever`; programs beyond `at_a_time` wait."""
    turns = threading.BoundedSemaphore(at_a_time)

    class Handler(BaseHTTPRequestHandler):
        """Handler that answers a program's questions, once it is its turn."""

        timeout = 60.0

        def do_POST(self) -> None:
            given = self.headers.get("Authorization") or ""
            if token is not None and not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return self._reply(401, {"error": "invalid token"})
            length = self.headers.get("Content-Length") or ""
            if not length.isdigit() or int(length) > LARGEST:
                return self._reply(413, {"error": f"Content-Length must be at most {LARGEST}"})
            try:
                asked = json.loads(self.rfile.read(int(length)))
                with turns:
                    return self._reply(200, answer(asked, backend))
            except (Refused, ValueError, RecursionError) as error:
                return self._reply(400, {"error": str(error)})
            except SandboxError as error:
                return self._reply(503, {"error": str(error)})

        def _reply(self, status: int, said: dict[str, Any]) -> None:
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing about requests."""

    return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run programs under Bubblewrap for `sandbox: remote`.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8900)
    parser.add_argument("--at-a-time", type=int, default=os.cpu_count() or 1, help="concurrent programs")
    parser.add_argument("--python", help="interpreter for the programs, with its packages")
    given = parser.parse_args()
    backend = Bubblewrap(given.python)
    problem = backend.problem()
    if problem:
        parser.error(problem)
    token = os.environ.pop("UNIT_TESTS_TOKEN", None)
    if token is None and given.host not in ("127.0.0.1", "localhost", "::1"):
        parser.error("UNIT_TESTS_TOKEN must be set to serve other hosts than 127.0.0.1")
    with serve(given.host, given.port, token, given.at_a_time, backend) as server:
        print(f"listening on {given.host}:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
