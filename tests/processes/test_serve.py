"""`hf-rlhf serve-reward`: real sources behind HTTP, asked by real requests, by `rewards.remote` and by a training."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import TrainerCallback

from hf_rlhf import load_plugin
from hf_rlhf.batch import Spans, TokenScores
from hf_rlhf.cli import main
from hf_rlhf.scoring.server import listening
from hf_rlhf.testing import rollouts
from tests.helpers import runs
from tests.helpers.processes import free_port
from tests.helpers.servers import ENVIRONMENT, serving, start_serving, until_serving
from tests.helpers.waits import scaled

FUNCTIONS = """
import time
from hf_rlhf.batch import Spans, TokenScores

def slow(rollouts):
    print("on stdout")
    time.sleep(60 if "hang" in rollouts.completions else 0)
    return [1.0] * len(rollouts)

def parts(rollouts):
    kinds = [3, None, Spans([(1, 0.5)]), TokenScores([0.25, -1.0])]
    return [kinds[int(text)] for text in rollouts.completions]

def wrong(rollouts):
    return "no list"
"""
RECIPE = """
rollout: {{use: generate}}
advantages: group_norm
rewards:
  - {{use: length, label: short texts, unit: characters, target: 1, maximum: 5}}
  - {{use: length, label: tokens, target: 1, maximum: 5}}
  - {{use: exact_match, label: match, column: truth, when: {{kind: [a, b]}}}}
  - {{use: function, function: "{file}:slow", timeout: 0.5, on_error: raise}}
  - {{use: function, function: "{file}:parts"}}
  - {{use: function, function: "{file}:wrong"}}
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the recipe's sources."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "recipe.yaml").write_text(RECIPE.format(file=folder / "functions.py"))
    with serving(str(folder / "recipe.yaml"), "--max-request-mib", "0.01") as found:
        yield found


def post(url: str, **fields: Any) -> httpx.Response:
    body = {"version": 1, "prompts": ["p"] * len(fields.get("completions", [])), **fields}
    return httpx.post(url, json=body, timeout=scaled(60), trust_env=False)


def test_health_lists_the_sources_and_the_columns_that_they_read(url):
    found = httpx.get(f"{url}/health", trust_env=False).json()
    assert found["version"] == 1
    assert list(found["sources"]) == ["short texts", "tokens", "match", "slow", "parts", "wrong"]
    assert found["sources"]["match"] == {"use": "exact_match", "columns": ["kind", "truth"], "concurrency": 1}


def test_each_source_answers_under_its_label(url):
    completions = ["", "abc", "abcdefg"]
    assert post(f"{url}/score/short%20texts", completions=completions).json() == {
        "version": 1,
        "scores": [0.0, -0.5, -1.0],
        "errors": [],
        "failed": 0,
    }
    columns = {"truth": ["", "x", "abcdefg"], "kind": ["a", "b", "c"]}
    assert post(f"{url}/score/match", completions=completions, columns=columns).json()["scores"] == [1.0, 0.0, None]
    assert post(f"{url}/score/match", completions=[], columns={"truth": [], "kind": []}).json()["scores"] == []


def test_remote_and_the_server_speak_the_same_protocol(url, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    given = rollouts(["0", "1", "2", "3"])
    far = load_plugin("rewards", "remote", url=f"{url}/score/parts", send_ids=True, batch_size=3)
    assert asyncio.run(far(given)) == [3.0, None, Spans([(1, 0.5)]), TokenScores([0.25, -1.0])]
    far = load_plugin("rewards", "remote", url=f"{url}/score/tokens", send_ids=True)
    assert asyncio.run(far(given)) == [-0.25] * 4


def test_a_call_that_takes_too_long_is_given_up_and_the_server_goes_on(url):
    late = post(f"{url}/score/slow", completions=["hang", "b"]).json()
    assert (late["scores"], late["failed"]) == ([None, None], 2)
    assert late["errors"][1] == {"row": 1, "kind": "timeout", "reason": "took over 0.5 s"}
    assert post(f"{url}/score/slow", completions=["a", "b"]).json()["scores"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("path", "fields", "status", "words"),
    [
        ("match", {"completions": ["a"]}, 422, "reads the columns kind, truth. Send them"),
        ("tokens", {"completions": ["a"]}, 422, "Send prompt_ids, completion_ids and masks"),
        ("parts", {"completions": ["3"]}, 422, "Send prompt_ids, completion_ids and masks"),
        ("short", {"completions": ["a"]}, 404, "no source short; use /score/short%20texts, /score/tokens"),
        ("", {"completions": ["a"]}, 404, "no source (none named); use"),
        ("slow", {"completions": "ab"}, 400, "completions must be a list"),
        ("slow", {"completions": [1]}, 400, "completions must be texts, got '1' in row 0"),
        ("slow", {"completions": ["a"], "prompts": []}, 400, "prompts must have one value per completion (1), got 0"),
        ("slow", {"completions": ["a"], "prompts": [[]]}, 400, "lists of messages"),
        ("slow", {"completions": ["a"], "version": 2}, 400, "this server speaks protocol version 1, got 2"),
        ("slow", {"completions": ["a"], "columns": {"x": []}}, 400, "x must have one value per completion (1), got 0"),
        ("slow", {"completions": ["a"], "columns": []}, 400, "columns must be a mapping"),
        (
            "slow",
            {"completions": ["a"], "finish_reasons": ["end"]},
            400,
            "finish_reasons must be 'stop' or 'length', got 'end'",
        ),
        ("slow", {"completions": ["a"], "group_ids": [True]}, 400, "group_ids must be whole numbers"),
        ("slow", {"completions": ["a"], "masks": [[1]]}, 400, "must be sent together"),
        ("slow", {"completions": ["a"], "masks": [[1]], "completion_ids": [[1, 2]]}, 400, "must be sent together"),
        ("slow", {"completions": ["a" * 20_000]}, 413, "at most 0.01 MiB. Send fewer rows"),
        ("wrong", {"completions": ["a"]}, 500, "must return a list with one number or None per row, got a str"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_wrong_request_is_told_what_is_wrong(url, path, fields, status, words):
    answer = post(f"{url}/score/{path}", **fields)
    assert answer.status_code == status
    assert words in answer.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 5000])
def test_what_is_no_json_object_is_refused(url, body):
    answer = httpx.post(f"{url}/score/slow", content=body, trust_env=False)
    assert answer.status_code == 400
    assert "the request must be" in answer.json()["error"]


def test_other_paths_and_methods_are_told_what_there_is(url):
    for answer, status in (
        (httpx.get(f"{url}/", trust_env=False), 404),
        (httpx.get(f"{url}/score/slow", trust_env=False), 405),
        (httpx.post(f"{url}/health", trust_env=False), 405),
        (httpx.post(f"{url}/score", json={}, trust_env=False), 404),
    ):
        assert answer.status_code == status
        assert "/score/slow" in answer.json()["error"]


# A training


LENGTH = {"use": "length", "label": "far", "target": 1, "maximum": 9}
SETTINGS = ["target=1", "maximum=9"]


def trained(folder: Path, source: dict[str, Any], **options: Any) -> Any:
    made = runs.trained(folder, rewards=[source, runs.FORMAT], training={"max_steps": 6}, **options)
    rewards = [
        {name: x for name, x in entry.items() if name.startswith(("reward/", "health/"))}
        for entry in runs.entries(made)
    ]
    return rewards, runs.parameters(made)


@pytest.mark.proves("rewards.remote", how="end to end", tolerance="exact")
def test_a_training_with_a_served_source_is_the_training_with_the_source_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    bearer = {"Authorization": "Bearer s3cret"}
    options = ("--token-env", "REWARD_TOKEN")
    with serving("length", *SETTINGS, *options, environment={"REWARD_TOKEN": "s3cret"}, headers=bearer) as url:
        refused = post(f"{url}/score", completions=["a"])
        assert refused.status_code == 401
        assert "Authorization: Bearer" in refused.json()["error"]
        far = {"use": "remote", "url": f"{url}/score", "label": "far", "send_ids": True, "batch_size": 3}
        remote, parameters = trained(tmp_path / "far", {**far, "token_env": "REWARD_TOKEN"})
    inline, expected = trained(tmp_path / "here", LENGTH)
    assert len({entry["reward/far/mean"] for entry in inline if "reward/far/mean" in entry}) > 1
    assert remote == inline
    assert torch.equal(parameters, expected)


class Killer(TrainerCallback):
    """Kills the server after the first rollout's updates and starts it again at the same port."""

    def __init__(self, port: int) -> None:
        self.words = ["length", *SETTINGS, "--port", str(port)]
        self.processes = [start_serving(*self.words)]
        until_serving(f"http://127.0.0.1:{port}", self.processes[0])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.processes[0].kill()
            self.processes[0].communicate()
            self.processes.append(start_serving(*self.words))


def test_a_server_that_is_killed_and_started_again_in_the_middle_of_a_training_loses_no_row(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port = free_port()
    killer = Killer(port)
    try:
        url = f"http://127.0.0.1:{port}/score"
        far = {"use": "remote", "url": url, "label": "far", "send_ids": True, "request_retries": 30, "max_wait": 2}
        remote, parameters = trained(tmp_path / "far", far, callbacks=[killer])
        assert [process.returncode for process in killer.processes] == [-signal.SIGKILL, None]
    finally:
        killer.processes[-1].terminate()
        killer.processes[-1].communicate(timeout=scaled(30))
    inline, expected = trained(tmp_path / "here", LENGTH)
    assert remote == inline
    assert torch.equal(parameters, expected)


# Starting and stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_where_it_serves_and_ends_in_peace(number):
    process = start_serving("length", "--port", "0")
    line = process.stdout.readline()
    url = line.split()[1].rstrip(",").removesuffix("/score")
    assert line == f"serving {url}/score, {url}/score/length\n"
    until_serving(url, process)
    process.send_signal(number)
    out, errors = process.communicate(timeout=scaled(30))
    assert (process.returncode, out, errors) == (0, "", "")


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["hf-rlhf", "serve-reward", *words])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    out, errors = capsys.readouterr()
    assert stopped.value.code == 2
    assert errors.startswith("error: ")
    assert "Traceback" not in out + errors
    return errors


def test_what_cannot_be_served_is_one_error(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    assert "no recipe and no reward plugin named 'lenght'" in refused(monkeypatch, capsys, "lenght")
    assert "NO_SUCH_TOKEN: this environment" in refused(monkeypatch, capsys, "length", "--token-env", "NO_SUCH_TOKEN")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in refused(monkeypatch, capsys, "length", "--port", port)
    missing = refused(monkeypatch, capsys, "reward_model", f"model={tmp_path}/none", "--port", "0")
    assert f"{tmp_path}/none" in missing


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serve-reward needs uvicorn: pip install 'hf_rlhf[serve]'" in refused(monkeypatch, capsys, "length")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "0"])
def test_an_address_that_others_reach_needs_a_token(host, monkeypatch, capsys):
    said = refused(monkeypatch, capsys, "length", "--host", host, "--port", "0")
    assert "requests must carry a token. Pass --token-env" in said


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_addresses_of_this_machine_need_none(host):
    with listening(host, 0) as where:
        assert ipaddress.ip_address(where.getsockname()[0]).is_loopback


def test_an_address_that_others_reach_serves_with_a_token():
    words = ("length", "--host", "0.0.0.0", "--port", "0", "--token-env", "REWARD_TOKEN")
    process = start_serving(*words, environment={"REWARD_TOKEN": "s3cret"})
    try:
        assert "0.0.0.0" in process.stdout.readline()
    finally:
        process.terminate()
        process.communicate(timeout=scaled(30))


def test_help_tells_of_both_commands():
    command = [sys.executable, "-m", "hf_rlhf", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True).stdout
    assert "serve-reward" in shown
    assert " score " in shown
