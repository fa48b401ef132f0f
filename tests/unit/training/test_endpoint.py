"""The endpoint at which an agent talks to the policy as to a server of OpenAI's chat protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from hf_rlhf.contract.environment import Over
from hf_rlhf.training.environments.endpoint import Endpoint

HELLO = [{"role": "user", "content": "hello"}]


class Policy:
    """Answers with `message` and notes what it was asked."""

    def __init__(self, **message: Any):
        self.message = {"role": "assistant", "content": "hi", "finish_reason": "stop", "turn": 0, **message}
        self.asked: list[dict[str, Any]] = []

    def __call__(self, messages: Any, **options: Any) -> dict[str, Any]:
        self.asked.append({"messages": messages, **options})
        return self.message


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


def post(url: str, body: Any, path: str = "chat/completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}/{path}", content=content, trust_env=False, timeout=30)


def test_an_answer_has_the_message_and_its_reason(endpoint):
    policy = Policy(finish_reason="length", reasoning_content="hm")
    body = {"model": "any", "messages": HELLO, "max_completion_tokens": 7, "stop": "end"}
    found = post(endpoint.open(policy), body).json()
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hi", "reasoning_content": "hm"}
    assert (choice["finish_reason"], found["model"], found["object"]) == ("length", "any", "chat.completion")
    assert policy.asked == [{"messages": HELLO, "tools": None, "max_tokens": 7, "stop": ["end"]}]


def test_tool_calls_are_text_with_numbers_of_their_own(endpoint):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    policy = Policy(content="", tool_calls=calls * 2, turn=3)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    choice = post(endpoint.open(policy), {"messages": HELLO, "tools": tools}).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["id"] for call in choice["message"]["tool_calls"]] == ["call_3_0", "call_3_1"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert policy.asked[0]["tools"] == tools


def test_a_stream_has_the_message_and_ends(endpoint):
    policy = Policy(tool_calls=[{"function": {"name": "add", "arguments": {}}}])
    text = post(endpoint.open(policy), {"messages": HELLO, "stream": True}).text
    *events, end = [line.removeprefix("data: ") for line in text.splitlines() if line]
    deltas = [json.loads(event)["choices"][0] for event in events]
    assert deltas[0]["delta"]["content"] == "hi"
    assert deltas[0]["delta"]["tool_calls"][0]["index"] == 0
    assert (deltas[1]["finish_reason"], end) == ("tool_calls", "[DONE]")


def test_sampling_arguments_are_overridden_and_counted(endpoint):
    url = endpoint.open(Policy())
    neutral = {"temperature": 1, "top_p": 1.0, "frequency_penalty": 0, "user": "x", "tool_choice": "auto", "seed": None}
    post(url, {"messages": HELLO, **neutral})
    assert not endpoint.overridden
    post(url, {"messages": HELLO, "temperature": 0, "top_p": 0.9, "seed": 3})
    post(url, {"messages": HELLO, "temperature": 0.7})
    assert endpoint.overridden == {"temperature": 2, "top_p": 1, "seed": 1}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": HELLO, "n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format must be"),
        ([1], "the request must be a JSON object, got list"),
        (b"{", "JSONDecodeError"),
    ],
)
def test_a_wrong_request_is_400_with_what_is_wrong(endpoint, body, words):
    policy = Policy()
    found = post(endpoint.open(policy), body)
    assert (found.status_code, policy.asked) == (400, [])
    assert words in found.json()["error"]["message"]


def test_an_episode_that_is_over_says_so_in_a_way_that_agents_do_not_try_again(endpoint):
    def over(messages: Any, **options: Any) -> Any:
        raise Over

    found = post(endpoint.open(over), {"messages": HELLO})
    assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_addresses_are_those_of_episodes_and_nobody_elses(endpoint):
    first, second = Policy(content="1"), Policy(content="2")
    urls = [endpoint.open(first), endpoint.open(second)]
    assert [post(url, {"messages": HELLO}).json()["choices"][0]["message"]["content"] for url in urls] == ["1", "2"]
    assert post(urls[0].replace("/v1", "x/v1"), {"messages": HELLO}).json()["error"]["code"] == "episode_over"
    assert post(urls[0], {"messages": HELLO}, "embeddings").status_code == 404
    assert httpx.get(f"{urls[0]}/models", trust_env=False).json()["data"][0]["id"] == "policy"


def test_requests_wait_side_by_side(endpoint):
    both = threading.Barrier(2, timeout=20)

    def waits(messages: Any, **options: Any) -> dict[str, Any]:
        both.wait()
        return {"role": "assistant", "content": "met"}

    urls = [endpoint.open(waits), endpoint.open(waits)]
    threads = [threading.Thread(target=post, args=(url, {"messages": HELLO})) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not both.broken
    assert not any(thread.is_alive() for thread in threads)
