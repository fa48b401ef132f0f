"""The sandbox `remote` and its runner: what goes over HTTP, who is answered, and what is no answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import yaml

from hf_rlhf import load_plugin
from hf_rlhf_plugins.rewards._sandbox import remote as remote_module
from hf_rlhf_plugins.rewards._sandbox.backend import Answer, Question, SandboxError
from hf_rlhf_plugins.rewards._sandbox.cases import cases_of
from hf_rlhf_plugins.rewards._sandbox.remote import BOUNDS, Remote
from hf_rlhf_plugins.rewards._sandbox.server import HIGHEST, LARGEST, serve
from tests.helpers.paths import ROOT
from tests.helpers.sandboxes import ask, bubblewrap, refused, seen, value

SQUARE = "def f(x): return x * x"


@pytest.fixture(autouse=True)
def forget_problems():
    """Each test tries its runner anew."""
    yield
    remote_module._problem.cache_clear()


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/run"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def runner():
    """The address of a real runner with a token, which runs programs under Bubblewrap."""
    with running(serve("127.0.0.1", 0, "open-sesame", 2, bubblewrap())) as url:
        yield url


def test_a_runner_gives_what_bubblewrap_gives_here(runner, monkeypatch):
    monkeypatch.setenv("RUNNER_TOKEN", "open-sesame")
    remote = Remote(runner, "RUNNER_TOKEN")
    assert remote.problem() is None
    program = SQUARE + "\nif __name__ == '__main__': print('é', f(int(input())))"
    asked = ["f(3)", "(1, {'a'}, 2.5)", Question("stdin", "4"), "f('x')", "1 << 100", "'\\ud800'"]
    assert ask(remote, program, *asked) == ask(bubblewrap(), program, *asked)
    assert ask(remote, "while True: pass", "1", seconds=1.0) == [Answer("failed", "no answer")]
    assert refused(remote, "import os\nopen(os.path.expanduser('~/.profile'))") == "FileNotFoundError"
    assert refused(remote, "open('/etc/passwd')") == "FileNotFoundError"


def test_a_runner_does_not_answer_strangers(runner, monkeypatch):
    monkeypatch.setenv("RUNNER_TOKEN", "guess")
    for remote in (Remote(runner), Remote(runner, "RUNNER_TOKEN")):
        with pytest.raises(SandboxError, match="status 401"):
            ask(remote, SQUARE, "f(3)")
        assert "status 401" in remote.problem()
    monkeypatch.delenv("RUNNER_TOKEN")
    assert "environment variable RUNNER_TOKEN is not set" in Remote(runner, "RUNNER_TOKEN").problem()


def test_a_runner_refuses_what_is_no_request(runner):
    headers = {"Authorization": "Bearer open-sesame"}
    good = {"version": 1, "nonce": "n", "code": SQUARE, "tests": [{"call": "f(3)"}]}

    def status(body, **more) -> int:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(runner, content=content, headers={**headers, **more}, trust_env=False).status_code

    assert status(good) == 200
    wrong = [{"version": 2}, {"code": 5}, {"tests": [{"shell": "ls"}]}, {"tests": "f"}, {"limits": {"memory": -1}}]
    wrong += [{"limits": {"disk": "much"}}, {"limits": {"network": 1}}, {"limits": {"seconds": float("nan")}}]
    for change in wrong:
        assert status({**good, **change}) == 400, change
    assert [status(body) for body in (b"{", b"[]", b"[" * 10**5, b"\xff")] == [400] * 4
    assert httpx.get(runner, trust_env=False).status_code == 501
    request = (
        f"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer open-sesame\r\nContent-Length: {LARGEST + 1}\r\n\r\n"
    )
    assert "413" in raw(runner, request)


def raw(url: str, request: str) -> str:
    import socket

    with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), 5) as connection:
        connection.sendall(request.encode())
        return connection.recv(100).decode()


def test_a_runner_bounds_what_it_is_asked_for(runner, monkeypatch):
    monkeypatch.setenv("RUNNER_TOKEN", "open-sesame")
    remote = Remote(runner, "RUNNER_TOKEN")
    code = "import resource\ndef f(): return resource.getrlimit(resource.RLIMIT_AS)[0]"
    assert seen(remote, "f()", code, memory=1 << 50) == HIGHEST.memory
    assert seen(remote, "f()", code, memory=1 << 29) == 1 << 29


ANSWERS = {
    "another nonce": b'{"nonce": "x", "results": [{"value": "9"}]}',
    "no nonce": b'{"results": [{"value": "9"}]}',
    "no object": b"[]",
    "no JSON": b"{",
    "too few results": b'{"nonce": "NONCE", "results": []}',
    "no list": b'{"nonce": "NONCE", "results": 5}',
    "a result of another kind": b'{"nonce": "NONCE", "results": [{"passed": true}]}',
    "a value that is no text": b'{"nonce": "NONCE", "results": [{"value": 9}]}',
    "too much": b'{"nonce": "NONCE", "results": [{"value": "' + b"9" * 8_000_000 + b'"}]}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_runner_that_answers_something_else_is_an_error_and_no_score(name):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert set(asked) == {"version", "nonce", "code", "tests", "limits"}
            body = ANSWERS[name].replace(b"NONCE", asked["nonce"].encode())
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                return

        def log_message(self, *args):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url, pytest.raises(SandboxError, match=url):
        ask(Remote(url), SQUARE, "f(3)")


def test_a_runner_that_is_not_there_is_an_error_that_names_it():
    with running(ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)) as url:
        pass
    problem = Remote(url).problem()
    assert url in problem
    assert "Start a runner there" in problem


PAGE = (ROOT / "docs" / "sandbox.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_exchange_that_the_page_shows_is_the_real_one(runner):
    tests, request, reply = map(json.loads, blocks("json"))
    assert len(cases_of(tests, "row")) == 3
    given = httpx.post(runner, json=request, headers={"Authorization": "Bearer open-sesame"}, trust_env=False)
    assert given.json() == reply
    assert set(request["limits"]) == set(BOUNDS)


def test_the_recipes_that_the_page_shows_can_be_read():
    sections = [yaml.safe_load(text) for text in blocks("yaml")]
    assert len(sections) == 3
    for section in sections:
        (settings,) = section["rewards"]
        assert load_plugin("rewards", settings.pop("use"), **settings)


def test_the_runner_is_a_command(tmp_path):
    bubblewrap()
    command = [sys.executable, "-m", "hf_rlhf_plugins.rewards._sandbox.server", "--port", "0"]
    environment = {name: text for name, text in os.environ.items() if name != "UNIT_TESTS_TOKEN"}
    open_to_all = subprocess.run([*command, "--host", "0.0.0.0"], env=environment, capture_output=True, text=True)
    assert open_to_all.returncode == 2
    assert "UNIT_TESTS_TOKEN must be set" in open_to_all.stderr
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().split()[-1]
            assert value(ask(Remote(f"http://{address}"), SQUARE, "f(5)")[0]) == 25
        finally:
            server.terminate()
