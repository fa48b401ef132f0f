"""`hf-rlhf serve-reward` against clients that stall, leave, flood, or lie about who they are."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.processes import free_port
from tests.helpers.servers import start_serving, until_serving
from tests.helpers.waits import scaled, until

SLEEPS = """
import time

def sleeps(completions, **columns):
    with open("{log}", "a") as log:
        log.write("".join(text + "\\n" for text in completions))
    for text in completions:
        time.sleep(float(text.split()[0]))
    return [1.0] * len(completions)
"""
SECONDS = 1.5
"""The server's --client-timeout."""


class Served:
    """A server of a function that sleeps as long as a completion says, and notes what it is called with."""

    def __init__(self, folder: Path, *words: str, environment: dict[str, str] | None = None) -> None:
        self.log = folder / "calls.txt"
        self.log.touch()
        (folder / "sleeps.py").write_text(SLEEPS.format(log=self.log))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._errors = (folder / "errors.txt").open("w+")
        options = ("--port", str(self.port), "--client-timeout", str(SECONDS))
        self.process = start_serving(f"{folder}/sleeps.py:sleeps", *words, *options, environment=environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        until_serving(self.url, self.process)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors.write(line)
            self._errors.flush()

    def post(self, *completions: str, **fields: Any) -> httpx.Response:
        body = {"version": 1, "prompts": ["p"] * len(completions), "completions": list(completions), **fields}
        return httpx.post(f"{self.url}/score", json=body, timeout=scaled(60), trust_env=False)

    def connect(self, sent: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=scaled(20))
        client.sendall(sent)
        return client

    def request(self, *completions: str, length: int | None = None) -> bytes:
        """The bytes of a request, which promises `length` bytes of body."""
        body = json.dumps({"version": 1, "prompts": ["p"] * len(completions), "completions": completions}).encode()
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
        return head.encode() + body

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    @property
    def errors(self) -> list[str]:
        return Path(self._errors.name).read_text().splitlines()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=scaled(30))
        self._reader.join(timeout=scaled(5))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Requests up to 1 MiB, 3 MiB in sum, four at a time in threads."""
    limits = ("--max-request-mib", "1", "--max-total-mib", "3", "--concurrency", "4")
    served = Served(tmp_path_factory.mktemp("served"), "workers=threads", "num_workers=4", *limits)
    yield served
    served.stop()
    assert not [line for line in served.errors if "Traceback" in line]


def test_several_requests_are_scored_at_a_time_up_to_the_bound(server):
    server.post("0")
    with ThreadPoolExecutor(8) as clients:
        for count, rounds in ((4, 1), (8, 2)):
            started = time.perf_counter()
            answers = list(clients.map(lambda i: server.post(f"1 at once {i}"), range(count)))
            seconds = time.perf_counter() - started
            assert all(answer.json()["scores"] == [1.0] for answer in answers)
            assert rounds <= seconds < count
    health = httpx.get(f"{server.url}/health", trust_env=False).json()
    assert health["sources"]["sleeps"]["concurrency"] == 4


def closed(client: socket.socket) -> bool:
    """Whether the server has closed the connection."""
    try:
        return client.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


def drip(client: socket.socket, content: bytes) -> None:
    """Sends a byte each 0.1 s, until the server has had enough."""
    for i in range(len(content)):
        time.sleep(0.1)
        try:
            client.sendall(content[i : i + 1])
        except OSError:
            return


@pytest.mark.parametrize("sent", [b"", b"POST /sc", b"POST /score HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_without_a_whole_head_is_closed(server, sent):
    started = time.perf_counter()
    with server.connect(sent) as client:
        assert closed(client)
    assert SECONDS - 0.1 < time.perf_counter() - started < scaled(10)
    until(lambda: any("which sent no request in 1.5 s" in line for line in server.errors), scaled(5))


def test_a_head_that_drips_is_closed_too(server):
    started = time.perf_counter()
    with server.connect() as client:
        threading.Thread(target=drip, args=(client, server.request("0")), daemon=True).start()
        assert closed(client)
    assert time.perf_counter() - started < scaled(10)


@pytest.mark.parametrize("dripping", [False, True])
def test_a_body_that_does_not_arrive_is_answered_with_408(server, dripping):
    with server.connect(server.request("0", length=2000)) as client:
        if dripping:
            threading.Thread(target=drip, args=(client, b" " * 1000), daemon=True).start()
        answer = b""
        while b"1.5 s" not in answer:
            answer += client.recv(1 << 16)
        assert b" 408 " in answer
        assert b"must arrive within 1.5 s" in answer


def test_an_answer_that_nobody_reads_is_given_up(server):
    """The answers to many requests on one connection fill what the system buffers."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.settimeout(scaled(20))
        # the path comes back in the answer
        request = b"GET /" + b"x" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            client.sendall(request * 5000)
    until(lambda: any("did not read its answer in 1.5 s" in line for line in server.errors), scaled(5))
    assert server.post("0").json()["scores"] == [1.0]


def test_requests_of_clients_that_left_are_not_computed_and_are_a_line_each(server):
    before = len(server.errors)
    with ThreadPoolExecutor(4) as clients:
        busy = [clients.submit(server.post, "2 busy") for _ in range(4)]
        until(lambda: server.calls.count("2 busy") == 4, scaled(10))
        for i in range(20):
            server.connect(server.request(f"0 gone {i}")).close()
        assert all(each.result().json()["scores"] == [1.0] for each in busy)
    assert server.post("0 after").json()["scores"] == [1.0]
    assert "0 after" in server.calls
    assert not [call for call in server.calls if "gone" in call]
    lines = server.errors[before:]
    assert len(lines) == 20
    assert all("left before the answer to /score" in line for line in lines)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_a_line(server):
    before = len(server.errors)
    server.connect(server.request("0 torn")[:-5]).close()
    until(lambda: len(server.errors) > before, scaled(5))
    assert server.post("0").json()["scores"] == [1.0]
    assert len(server.errors) == before + 1
    assert "0 torn" not in server.calls


def test_bodies_are_bounded_in_sum(server):
    filler = b" " * 900_000
    held = [server.connect(server.request("0", length=1_000_000) + filler) for _ in range(3)]
    time.sleep(0.3)
    fourth = server.connect(server.request("0", length=1_000_000) + filler)
    answer = fourth.recv(1 << 16)
    assert b" 503 " in answer
    assert b"retry-after: 1" in answer.lower()
    for client in (*held, fourth):
        client.close()
    until(lambda: server.post("0").status_code == 200, scaled(5))


def test_a_flood_of_large_bodies_leaves_the_server_small(server):
    def memory() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) // 1024

    before = memory()
    flood = [server.connect(server.request("0", length=1_000_000)) for _ in range(100)]
    highest = before
    for client in flood:
        with_room = threading.Thread(target=_send, args=(client, b" " * 999_000), daemon=True)
        with_room.start()
    for _ in range(20):
        time.sleep(0.1)
        highest = max(highest, memory())
    for client in flood:
        client.close()
    assert highest - before < 40  # of 100 MB
    until(lambda: server.post("0").status_code == 200, scaled(10))


def _send(client: socket.socket, content: bytes) -> None:
    try:
        client.sendall(content)
    except OSError:
        return


def test_a_path_forges_no_line_of_the_log(server):
    before = len(server.errors)
    request = server.request("2 forged").replace(b"/score ", b"/score/%0aWARNING%20all%20is%20well%1b[31m ")
    with server.connect(request) as client:
        assert b" 404 " in client.recv(1 << 16)
    assert not [line for line in server.errors[before:] if line.startswith("WARNING")]


@pytest.mark.parametrize("token", ["geheim", "schlüssel", "鍵", "a b"])
def test_tokens_are_compared_as_bytes(tmp_path, token):
    """A client sends UTF-8, or Latin-1 where the token allows it, as http.client does."""
    from hf_rlhf.scoring.server import _carries

    carries: Callable[[bytes], bool] = lambda header: _carries(_request(header), token)  # noqa: E731
    assert carries(f"Bearer {token}".encode())
    assert carries(f"bearer  {token}".encode())
    for wrong in (
        b"",
        b"Bearer",
        b"Bearer ",
        f"Basic {token}".encode(),
        f"Bearer {token}x".encode(),
        b"Bearer ?",
        b"Bearer \xff",
    ):
        assert not carries(wrong)
    if token == "schlüssel":
        assert carries(f"Bearer {token}".encode("latin-1"))
    assert not carries(f"Bearer {token}".encode("ascii", "replace")) or token.isascii()


def _request(authorization: bytes) -> Any:
    from starlette.requests import Request

    return Request({"type": "http", "headers": [(b"authorization", authorization)]})


def test_a_token_beyond_ascii_opens_the_server_to_remote(tmp_path, monkeypatch):
    import asyncio

    from hf_rlhf import load_plugin
    from hf_rlhf.testing import rollouts

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("REWARD_TOKEN", "schlüssel 鍵")
    environment = {"REWARD_TOKEN": "schlüssel 鍵"}
    served = Served(tmp_path, "--token-env", "REWARD_TOKEN", environment=environment)
    try:
        assert served.post("0").status_code == 401
        assert served.calls == []
        remote = load_plugin("rewards", "remote", url=f"{served.url}/score", token_env="REWARD_TOKEN")
        assert asyncio.run(remote(rollouts(["0", "0"]))) == [1.0, 1.0]
    finally:
        served.stop()


LOSES_SIGNALS = """
import os, signal

class Leaves:
    def __del__(self):
        os.kill(os.getpid(), signal.{signal})

def loses(completions, **columns):
    Leaves()
    return [1.0] * len(completions)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_arrives_where_exceptions_are_lost_stops_the_server(tmp_path, name):
    (tmp_path / "loses.py").write_text(LOSES_SIGNALS.format(signal=name))
    port = free_port()
    process = start_serving(f"{tmp_path}/loses.py:loses", "--port", str(port))
    try:
        until_serving(f"http://127.0.0.1:{port}", process)
        body = {"version": 1, "prompts": ["p"], "completions": ["c"]}
        httpx.post(f"http://127.0.0.1:{port}/score", json=body, timeout=scaled(20), trust_env=False)
        assert process.wait(timeout=scaled(20)) == 0
    finally:
        process.kill()
