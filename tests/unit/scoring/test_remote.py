"""Rewards from a server: what is sent, what is taken for an answer, and what a server that is down, slow or wrong does."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity

from hf_rlhf import load_plugin
from hf_rlhf.batch import Rollouts, Spans, TokenScores
from hf_rlhf.scoring.scorer import Scorer
from hf_rlhf.testing import conformance, rollouts
from hf_rlhf_plugins import _http
from hf_rlhf_plugins._http import HttpError
from hf_rlhf_plugins.rewards.remote import Remote
from tests.helpers.processes import free_port
from tests.helpers.servers import Raw, Server
from tests.helpers.waits import scaled

TEXTS = ["5", "ab", "", "long text"]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go to this machine itself; waits are short."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_http, "FIRST_WAIT", 0.02)


def lengths(body: dict[str, Any], number: int) -> dict[str, Any]:
    return {"version": 1, "scores": [len(text) for text in body["completions"]]}


def ask(source: Remote, given: Rollouts | None = None) -> Any:
    return asyncio.run(source(rollouts(TEXTS) if given is None else given))


def remote(server: Server | str, **settings: Any) -> Remote:
    url = server if isinstance(server, str) else f"{server.url}/score"
    return load_plugin("rewards", "remote", url=url, **settings)


def refusal(reply: Any, **settings: Any) -> str:
    with Server(lambda body, i: reply) as server, pytest.raises(HttpError) as refused:
        ask(remote(server, request_retries=1, **settings))
    assert f"{server.url}/score" in str(refused.value)
    return str(refused.value)


# What is sent and what comes back


@pytest.mark.proves("rewards.remote", how="closed form", tolerance="exact")
def test_each_row_gets_what_the_server_says_of_it():
    with Server(lengths) as server:
        assert ask(remote(server)) == [1.0, 2.0, 0.0, 9.0]
        assert ask(remote(server), rollouts([])) == []
    assert len(server.requests) == 1


def test_the_batch_size_changes_the_requests_and_no_score():
    with Server(lengths) as server:
        for size, sizes in ((1, [1, 1, 1, 1]), (3, [1, 3]), (64, [4]), (None, [4])):
            server.requests.clear()
            assert ask(remote(server, batch_size=size)) == [1.0, 2.0, 0.0, 9.0]
            assert sorted(len(request.body["completions"]) for request in server.requests) == sizes


def test_a_request_holds_the_version_the_texts_and_the_columns_that_it_is_told_to_send():
    columns = {"answer": ["5", None, "7", "8"], "secret": [1, 2, 3, 4], "odd": [math.nan, {"a": (1, math.inf)}, 3, 4]}
    given = rollouts(TEXTS, columns=columns)
    with Server(lengths) as server:
        source = remote(server, send=["answer", "odd"])
        assert source.columns() == {"answer", "odd"}
        ask(source, given)
        ask(remote(server, send_ids=True), given)
    first, second = (request.body for request in server.requests)
    assert first == {
        "version": 1,
        "prompts": given.prompts,
        "completions": TEXTS,
        "finish_reasons": ["stop", "length", "stop", "length"],
        "group_ids": [0, 0, 1, 1],
        "columns": {"answer": ["5", None, "7", "8"], "odd": [None, {"a": [1, None]}, 3, 4]},
    }
    assert second["columns"] == {}
    assert second["completion_ids"] == given.completion_ids
    assert second["masks"] == given.masks
    assert second["prompt_ids"] == given.prompt_ids


def test_half_a_surrogate_pair_and_chat_prompts_arrive():
    given = rollouts(["x"], prompts=[[{"role": "user", "content": "\ud83d"}]])
    given.completions = ["\ud83d and \u2028"]
    with Server(lengths) as server:
        ask(remote(server), given)
    assert server.requests[0].body["completions"] == given.completions
    assert server.requests[0].body["prompts"] == given.prompts


def test_scores_by_step_and_by_token_and_no_score_are_taken():
    answers = [None, {"spans": [[1, 0.5], [2, -1]]}, {"tokens": [0.25]}, 3]
    with Server(lambda body, i: {"version": 1, "scores": answers}) as server:
        found = ask(remote(server))
        assert found == [None, Spans([(1, 0.5), (2, -1.0)]), TokenScores([0.25]), 3.0]
        with Scorer([("far", remote(server))]) as scorer:
            asked = scorer.ask(rollouts(TEXTS))["far"].answers
    assert math.isnan(asked[0])
    assert asked[1:] == found[1:]


def test_rows_that_failed_at_the_server_are_counted(caplog):
    answer = {"version": 1, "scores": [1, None, 2, 3], "failed": 1, "errors": [{"row": 1, "reason": "took over 5 s"}]}
    with Server(lambda body, i: answer) as server:
        source = remote(server)
        assert ask(source) == [1.0, None, 2.0, 3.0]
    assert source.take_logs() == ({}, {"failed_frac": [0.25] * 4})
    assert source.take_logs() == ({}, {})
    assert "1 of 4 rows failed" in caplog.text
    assert "took over 5 s" in caplog.text


def test_it_conforms_with_a_server_behind_it():
    with Server(lengths) as server:
        facts = conformance(remote(server))
        assert len(facts) >= 6
        for fact in facts:
            fact()


# Secrets


def test_secrets_come_from_the_environment_and_stand_in_no_recipe(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    with Server(lengths) as server:
        ask(remote(server, token_env="REWARD_TOKEN", headers={"X-Team": "red", "X-Api-Key": "k-${REWARD_TOKEN}"}))
    sent = server.requests[0].headers
    assert (sent["authorization"], sent["x-team"], sent["x-api-key"]) == ("Bearer s3cret", "red", "k-s3cret")
    for settings, words in (
        ({"headers": {"authorization": "Bearer abc"}}, "write authorization: ${NAME}"),
        ({"headers": {"Authorization": "${X}"}, "token_env": "X"}, "only one of token_env"),
    ):
        with pytest.raises(Exception, match="remote") as refused:
            remote("http://127.0.0.1/x", **settings)
        assert words in str(refused.value)


def test_a_variable_that_is_not_set_is_named_before_the_run(monkeypatch):
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    source = remote("http://127.0.0.1:1/x", token_env="REWARD_TOKEN")
    assert list(source.check(None)) == ["rewards.remote: environment variable REWARD_TOKEN is not set"]
    with pytest.raises(ValueError, match="REWARD_TOKEN is not set"):
        source.setup(None)
    assert list(remote("http://127.0.0.1:1/x").check(None)) == []


def test_secrets_are_in_no_message_and_in_no_copy(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    with Server(lambda body, i: Raw(b"no", 403)) as server:
        source = pickle.loads(pickle.dumps(remote(server, token_env="REWARD_TOKEN")))
        with pytest.raises(HttpError) as refused:
            ask(source)
    assert "s3cret" not in str(refused.value)
    assert b"s3cret" not in pickle.dumps(source)
    assert server.requests[0].headers["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("url", ["127.0.0.1:80/x", "ftp://host/x", "http://", "http://me:pw@host/x", "http://h:99999/"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(Exception, match="url"):
        remote(url)


# A server that is down, slow, full or wrong


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Raw(b"<html>login</html>"), ["not JSON", "<html>login"]),
        (Raw(b'{"version": 1, "scores": [NaN, 1, 2, 3]}'), ["not JSON", "NaN"]),
        (Raw(b""), ["not JSON"]),
        (Raw(b"\xff\xfe"), ["not JSON"]),
        (Raw(b"[" * 100_000), ["not JSON"]),
        ([1, 2, 3, 4], ['must be {"version": 1, "scores": [...]}', "[1, 2, 3, 4]"]),
        ({"version": 1, "scores": {"a": 1}}, ["must be"]),
        ({"version": 2, "scores": [1, 2, 3, 4]}, ["version must be 1", "not 2"]),
        ({"scores": [1, 2, 3, 4]}, ["version must be 1", "not None"]),
        ({"version": 1, "scores": [1, 2, 3]}, ["one per completion (4)", "not 3"]),
        ({"version": 1, "scores": [1, 2, 3, 4, 5]}, ["not 5"]),
        ({"version": 1, "scores": [1, "NaN", 3, 4]}, ["row 1", "NaN"]),
        ({"version": 1, "scores": [1, 2, True, 4]}, ["row 2", "True"]),
        ({"version": 1, "scores": [1, 2, [3], 4]}, ["row 2", "[3]"]),
        ({"version": 1, "scores": [10**400, 2, 3, 4]}, ["row 0"]),
        ({"version": 1, "scores": [{"spans": [[1.5, 2]]}, 2, 3, 4]}, ["row 0"]),
        ({"version": 1, "scores": [{"spans": [[1, 2, 3]]}, 2, 3, 4]}, ["row 0"]),
        ({"version": 1, "scores": [{"tokens": ["a"]}, 2, 3, 4]}, ["row 0"]),
        ({"version": 1, "scores": [1, 2, 3, 4], "failed": "x"}, ["failed must be a number"]),
        (Raw(b'{"error": "no column answer"}', 422), ["HTTP 422", "no column answer"]),
        (Raw(b"", 302, {"Location": "http://127.0.0.1:1/"}), ["HTTP 302"]),
    ],
    ids=lambda x: None if isinstance(x, list) else str(x)[:40],
)
def test_a_wrong_answer_names_the_server_and_what_came(reply, words):
    said = refusal(reply)
    for word in words:
        assert word in said
    assert len(said) < 700


def test_what_asking_again_cannot_mend_is_asked_once():
    for reply in (Raw(b"no", 400), Raw(b"no", 404), Raw(b"<html>"), {"version": 1, "scores": []}):
        with Server(lambda body, i, reply=reply: reply) as server, pytest.raises(HttpError):
            ask(remote(server))
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "trouble", [Raw(status=500), Raw(status=503), Raw(status=429), Raw(status=408), Raw(drop=True)]
)
def test_what_asking_again_can_mend_is_asked_again(trouble):
    with Server(lambda body, i: trouble if i < 3 else lengths(body, i)) as server:
        assert ask(remote(server)) == [1.0, 2.0, 0.0, 9.0]
    assert len(server.requests) == 4
    with Server(lambda body, i: trouble) as server, pytest.raises(HttpError, match=r"tried 3 times"):
        ask(remote(server, request_retries=2))
    assert len(server.requests) == 3


def test_retry_after_is_honoured_up_to_max_wait():
    busy = Raw(status=429, headers={"Retry-After": "1"})
    with Server(lambda body, i: busy if i == 0 else lengths(body, i)) as server:
        assert ask(remote(server)) == [1.0, 2.0, 0.0, 9.0]
    first, second = (request.at for request in server.requests)
    assert second - first >= 1.0
    with (
        Server(lambda body, i: busy) as server,
        pytest.raises(HttpError, match=r"asks to wait 1 s, and max_wait is 0\.5 s"),
    ):
        ask(remote(server, max_wait=0.5))
    assert len(server.requests) == 1


def test_retry_after_may_be_a_date():
    from datetime import UTC, datetime, timedelta
    from email.utils import format_datetime

    assert 50 < _http._asked_wait(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)) <= 60
    assert _http._asked_wait(format_datetime(datetime.now(UTC) - timedelta(seconds=60), usegmt=True)) == 0
    assert [_http._asked_wait(x) for x in (None, "", "soon", "-3", "7", "0.5")] == [0, 0, 0, 0, 7, 0.5]


def test_waits_grow_to_max_wait_and_are_jittered():
    endpoint = _http.Endpoint("http://127.0.0.1/", 1.0, 9, 0.3, None)

    def wait(tries: int) -> float:
        failed = tenacity.Future.construct(tries, _http._TryAgain("full"), True)
        return endpoint._wait(SimpleNamespace(attempt_number=tries, outcome=failed))  # type: ignore[arg-type]

    for tries, longest in ((1, 0.02), (2, 0.04), (4, 0.16), (5, 0.3), (5000, 0.3)):
        waits = {wait(tries) for _ in range(20)}
        assert len(waits) > 1
        assert all(longest / 2 <= wait <= longest for wait in waits)


def test_a_server_that_hangs_or_drips_is_given_up_in_time():
    def hangs(body: Any, i: int) -> Any:
        time.sleep(10)
        return lengths(body, i)

    for reply in (hangs, lambda body, i: Raw(b" " * 1000, drip=0.05)):
        started = time.monotonic()
        with Server(reply) as server, pytest.raises(HttpError, match=r"no answer within 0\.2 s \(tried 2 times\)"):
            ask(remote(server, request_timeout=0.2, request_retries=1))
        assert time.monotonic() - started < scaled(8)


def test_a_server_that_is_down_is_named():
    url = f"http://127.0.0.1:{free_port()}/score"
    with pytest.raises(HttpError) as refused:
        ask(remote(url, request_retries=1))
    assert f"{url}: ConnectError" in str(refused.value)


def test_an_endless_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(_http, "LARGEST", 1 << 20)
    assert "exceeds 1 MiB" in refusal(Raw(b" " * (2 << 20)))


def test_at_most_num_workers_requests_are_under_way():
    state = {"now": 0, "most": 0}
    lock = threading.Lock()

    def slow(body: Any, i: int) -> Any:
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        time.sleep(0.2)
        with lock:
            state["now"] -= 1
        return lengths(body, i)

    with Server(slow) as server:
        ask(remote(server, batch_size=1, num_workers=2), rollouts(["a"] * 8))
        assert state["most"] == 2
        state["most"] = 0
        ask(remote(server, batch_size=1, num_workers=None), rollouts(["a"] * 8))
    assert state["most"] > 2


def test_a_failed_request_ends_the_others():
    def reply(body: Any, i: int) -> Any:
        if body["completions"] == ["bad"]:
            return Raw(b"no", 400)
        time.sleep(10)
        return lengths(body, i)

    started = time.monotonic()
    with Server(reply) as server, pytest.raises(HttpError, match="HTTP 400"):
        ask(remote(server, batch_size=1), rollouts(["bad", "a", "b"]))
    assert time.monotonic() - started < scaled(8)


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    found: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        found[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_it_can_be_asked_from_several_event_loops_and_closes_its_connections(recwarn):
    with Server(lengths) as server:
        source = remote(server)
        assert in_threads([lambda: ask(source)] * 4) == [[1.0, 2.0, 0.0, 9.0]] * 4
        assert source._server._sessions == {}
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]


@pytest.mark.parametrize("workers", ["inline", "threads", "processes"])
def test_it_runs_wherever_a_source_runs(workers):
    with Server(lengths) as server, Scorer([("far", remote(server, workers=workers, num_workers=2))]) as scorer:
        asked = scorer.ask(rollouts(TEXTS))["far"]
        assert (asked.answers, asked.failures) == ([1.0, 2.0, 0.0, 9.0], [])


def test_a_server_that_stays_away_leaves_rows_without_a_score():
    source = remote(f"http://127.0.0.1:{free_port()}/x", request_retries=0)
    with Scorer([("far", source)]) as scorer:
        asked = scorer.ask(rollouts(TEXTS), counts=False)["far"]
    assert all(math.isnan(x) for x in asked.answers)
    assert [failure.kind for failure in asked.failures] == ["error"] * 4
    assert "ConnectError" in asked.failures[0].reason
