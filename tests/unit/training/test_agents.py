"""Agents with a loop of their own, which talk to the policy over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from hf_rlhf.axes import Model, Task
from tests.helpers.environments import Plain, Played1, play
from tests.helpers.waits import scaled


def _post(url: str, messages: list[dict[str, Any]], **fields: Any) -> httpx.Response:
    return httpx.post(
        f"{url}/chat/completions", json={"messages": messages, **fields}, trust_env=False, timeout=scaled(30)
    )


def _agent(task: Task, url: str) -> float:
    """Talks over two turns, in a process' own words: reasoning and extra fields are gone from what it sends back."""
    first = _post(url, task.messages, temperature=0).json()["choices"][0]
    said = {"role": "assistant", "content": first["message"]["content"] + " "}
    second = _post(url, [*task.messages, said, {"role": "user", "content": "ba"}], max_tokens=2).json()["choices"][0]
    return float(second["finish_reason"] == "length")


def _plainly(task: Task, model: Any) -> float:
    return _agent(task, model.url)


async def _awaited(task: Task, model: Model) -> float:
    return await asyncio.to_thread(_agent, task, model.url)


@pytest.mark.parametrize("made", [lambda: Plain(function=_plainly), lambda: Played1(function=_awaited)])
def test_an_agent_talks_to_the_policy_over_its_url_and_tokens_are_kept(made, caplog):
    played = play(made(), prompts=("ab", "ba"), group=2)
    assert played.completions.columns["episode/reward"] == [1.0] * 4
    assert played.overridden == 4
    assert caplog.text.count("agents set temperature in their requests") == 1
    direct = play(Played1(function=directly), prompts=("ab", "ba"), group=2)
    assert (played.completions.ids, played.completions.masks) == (direct.completions.ids, direct.completions.masks)
    assert played.completions.logps == direct.completions.logps


async def directly(task: Task, model: Model) -> float:
    first = await model(task.messages)
    second = await model([*task.messages, first, {"role": "user", "content": "ba"}], max_tokens=2)
    return float(second["finish_reason"] == "length")


@pytest.mark.parametrize("made", [lambda f: Plain(function=f), lambda f: Played1(function=_in_thread(f))])
def test_an_agent_whose_episode_is_over_ends_it_as_over(made):
    def never_ends(task: Task, model: Any) -> float:
        messages = task.messages
        while True:
            found = _post(model.url, messages)
            found.raise_for_status()
            messages = [*messages, found.json()["choices"][0]["message"], {"role": "user", "content": "b"}]

    environment = made(never_ends)
    environment.max_turns = 3
    played = play(environment)
    assert played.completions.columns["episode/end"] == ["over"]
    assert played.completions.finish_reasons == ["length"]


def _in_thread(function: Any) -> Any:
    async def awaited(task: Task, model: Any) -> Any:
        return await asyncio.to_thread(function, task, model)

    return awaited


def test_an_address_ends_with_the_rollout():
    kept = []

    def keeps(task: Task, model: Any) -> float:
        kept.append(model.url)
        assert model.url == kept[-1]
        return float(_post(model.url, task.messages).status_code == 200)

    assert play(Plain(function=keeps)).completions.columns["episode/reward"] == [1.0]
    with pytest.raises(httpx.TransportError):
        _post(kept[0], [{"role": "user", "content": "ab"}])
