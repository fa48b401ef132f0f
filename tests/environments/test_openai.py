"""Agents that speak OpenAI's protocol, by its Python client itself."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from hf_rlhf.axes import Task
from tests.helpers.environments import Plain, Played1, play
from tests.helpers.waits import scaled
from tests.unit.training.test_agents import directly

pytestmark = pytest.mark.environments

CLIENT = """
import json, sys
import openai

url, messages, streams = json.loads(sys.argv[1])
client = openai.OpenAI(base_url=url, api_key="none", max_retries=5)

def ask(messages, **options):
    if not streams:
        return client.chat.completions.create(model="policy", messages=messages, **options).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(
        model="policy", messages=messages, stream=True, **options)]
    chunks[-1].message = chunks[0].delta
    return chunks[-1]

first = ask(messages)
more = [*messages, {"role": "assistant", "content": first.message.content}, {"role": "user", "content": "ba"}]
second = ask(more, max_tokens=2)
refused = ""
try:
    client.chat.completions.create(model="policy", messages=more, n=0)
except openai.BadRequestError as error:
    refused = error.body["message"]
print(json.dumps([second.finish_reason, refused, [model.id for model in client.models.list()]]))
"""


def run(url: str, messages: list[dict[str, Any]], streams: bool) -> list[Any]:
    command = [sys.executable, "-c", CLIENT, json.dumps([url, messages, streams])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(60))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("streams", [False, True])
def test_openais_client_plays_the_episode_that_an_environment_plays(streams):
    def plays(task: Task, model: Any) -> float:
        reason, refused, models = run(model.url, task.messages, streams)
        assert refused.startswith("n must be")
        assert models == ["policy"]
        return float(reason == "length")

    played, direct = play(Plain(function=plays, timeout=scaled(60))), play(Played1(function=directly))
    assert played.completions.columns["episode/reward"] == [1.0]
    assert (played.completions.ids, played.completions.masks) == (direct.completions.ids, direct.completions.masks)


def test_openais_client_does_not_try_again_when_an_episode_is_over():
    def plays(task: Task, model: Any) -> float:
        run(model.url, task.messages, False)
        raise AssertionError("its second request was answered")

    environment = Plain(function=plays, max_turns=1, timeout=scaled(60))
    assert play(environment).completions.columns["episode/end"] == ["over"]
