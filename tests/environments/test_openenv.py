"""The example package for OpenEnv, with a server and the client of OpenEnv itself."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_rlhf.axes import Environment
from hf_rlhf.testing import conformance
from tests.helpers.environments import Says, opened, play
from tests.helpers.paths import ROOT
from tests.helpers.waits import until

pytestmark = pytest.mark.environments
sys.path.insert(0, str(ROOT / "examples" / "environments" / "hf-rlhf-openenv"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("openenv_server.py")), str(port)])

    def answers() -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) == 0

    until(answers, 120)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def sessions(url: str, **settings: object) -> Environment:
    from hf_rlhf_openenv import OpenEnv

    return OpenEnv(**{"url": url, "action": "message", "observation": "text", "max_live": 4, **settings})


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_an_episode_is_a_session_and_a_turn_a_step(url: str, workers: str) -> None:
    with opened(sessions(url, workers=workers, num_workers=4)) as environment:
        played = play(environment, Says(texts=("2", "1")), ["say "], group=4)
    found = played.completions.columns
    assert found["episode/end"] == ["played"] * 4, played.reasons
    assert found["episode/done"] == [True] * 4
    for messages, rewards in zip(played.messages, found["episode/turn_rewards"], strict=True):
        first = int(messages[0]["content"].removeprefix("say "))
        assert [message["content"] for message in messages[2::2]] == [str(n) for n in range(first - 1, 0, -1)]
        assert rewards == ([1.0, 1.0] if first == 2 else [0.0, 0.0, 1.0])
    assert {len(rewards) for rewards in found["episode/turn_rewards"]} == {2, 3}


def test_turns_that_are_used_up_end_a_session_and_a_server_that_is_gone_gives_no_score(url: str) -> None:
    with opened(sessions(url, max_turns=1)) as environment:
        found = play(environment, Says(), ["say "]).completions.columns
    assert found["episode/done"] == [False]
    with opened(sessions("http://127.0.0.1:9", timeout=30.0)) as environment:
        played = play(environment, Says(), ["say "])
    assert played.completions.columns["episode/end"] == ["error"]
    assert played.completions.columns["episode/reward"] == [None]


def test_it_conforms(url: str) -> None:
    for fact in conformance(sessions(url)):
        fact()
