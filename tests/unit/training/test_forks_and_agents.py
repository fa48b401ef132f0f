"""Forks and agents: a row is one agent of an episode, with all its turns in the order in which they were sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import Model, Outcome, Task, Turn
from hf_rlhf.batch import TokenScores
from hf_rlhf.testing import rollouts
from hf_rlhf.training.environments.episode import EnvironmentFailure
from tests.helpers.environments import Plain, Played1, ReadsTurns, Says, play, policy
from tests.helpers.waits import scaled

User = dict[str, Any]


def user(text: str) -> User:
    return {"role": "user", "content": text}


def text(ids: list[int]) -> str:
    return str(policy().tokenizer.decode(ids))


def ids_of(words: str) -> list[int]:
    found: list[int] = policy().tokenizer(words, add_special_tokens=False)["input_ids"]
    return found


END = policy().tokenizer.eos_token


async def leaves_and_returns(task: Task, model: Model) -> Outcome:
    """A turn, one in another conversation, and one that goes on from the first."""
    first = await model(task.messages)
    await model([user("zz")])
    await model([*task.messages, first, user("cd")])
    return Outcome(turns=[Turn(reward=1.0), Turn(reward=2.0), Turn(reward=3.0)])


def test_a_turn_in_another_conversation_is_a_fork_and_so_is_the_way_back() -> None:
    played = play(Played1(function=leaves_and_returns), Says(texts=("x", "y", "z")))
    c = played.completions
    assert [text(ids) for ids in c.ids] == [f"x{END}y{END}z{END}"]
    assert c.masks == [[1] * 6]
    assert c.forks is not None
    assert [(start, text(ids)) for start, ids in c.forks[0]] == [(2, "zz"), (4, f"abx{END}cd")]
    assert c.columns["episode/turn_ends"] == [[1, 3, 5]]
    assert c.columns["episode/turn_rewards"] == [[1.0, 2.0, 3.0]]
    assert [message["content"] for message in played.messages[0]] == ["ab", "x", "cd", "z"]


def test_a_conversation_that_goes_on_has_no_fork_whatever_was_asked_and_not_answered() -> None:
    async def asks_in_vain(task: Task, model: Model) -> None:
        said = await model(task.messages)
        await model([*task.messages, said, user("c")], max_tokens=1)

    played = play(Played1(function=asks_in_vain))
    assert played.completions.forks == [[]]


def test_the_engine_knows_each_conversation_by_one_number_and_drops_all_of_them() -> None:
    asked: list[list[int]] = []
    dropped: list[int] = []

    @dataclass(kw_only=True)
    class Sessions(Says):
        def session(self, policy: Any, *, temperature: float | None = None) -> Any:
            made = super().session(policy, temperature=temperature)
            session = made.__enter__()
            own = session.ask
            session.ask = lambda rows, *a: (asked.append(list(rows)), own(rows, *a))[1]  # type: ignore[method-assign]
            session.drop = dropped.append  # type: ignore[method-assign]
            import contextlib

            return contextlib.nullcontext(session)

    play(Played1(function=leaves_and_returns), Sessions(texts=("x", "y", "z")), group=2)
    assert asked == [[0, 1], [2, 3], [0, 1]]
    assert sorted(dropped) == [0, 1, 2, 3]


async def duel(task: Task, model: Model) -> Outcome:
    """Two agents in turn; the second reads what the first said."""
    one = await model(task.messages, agent="first")
    other = await model([user(f"he says {one['content']}")], agent="second")
    await model([*task.messages, one, user(other["content"])], agent="first")
    return Outcome(reward={"first": 1.0, "second": -1.0}, columns={"moves": 3})


@dataclass(kw_only=True)
class Duel(Played1):
    name = "duel"
    agents = ("first", "second")


def test_each_agent_is_a_row_with_its_own_tokens_prompt_and_reward() -> None:
    played = play(Duel(function=duel), Says(texts=("x", "y", "z")), group=2)
    c = played.completions
    assert (c.episodes, c.agents) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert [text(ids) for ids in c.ids] == [f"x{END}yz{END}", f"y{END}"] * 2
    assert c.masks == [[1, 1, 0, 1, 1], [1, 1]] * 2
    assert [text(ids) for ids in played.prompt_ids] == ["ab", "he says x"] * 2
    assert played.prompts == ["ab", "he says x"] * 2
    assert c.forks == [[]] * 4
    assert c.columns["episode/agent"] == ["first", "second"] * 2
    assert c.columns["episode/reward"] == [1.0, -1.0] * 2
    assert c.columns["episode/moves"] == [3] * 4


def test_rewards_by_turn_go_to_the_agent_whose_turn_it_was() -> None:
    async def paid(task: Task, model: Model) -> Outcome:
        await duel(task, model)
        return Outcome(turns=[Turn(reward=0.5, state="a"), Turn(reward=2.0), Turn(reward=4.0)])

    columns = play(Duel(function=paid), advantages=ReadsTurns()).completions.columns
    assert columns["episode/turn_rewards"] == [[0.5, 4.0], [2.0]]
    assert columns["episode/turn_ends"] == [[2, 7], [2]]
    assert [len(states) for states in columns["episode/turn_states"]] == [2, 1]
    assert columns["episode/turn_states"][0][0] == "named a"
    assert load_plugin("rewards", "episode")(_rows([[1, 1, 0, 1], [1]], [[0.5, 4.0], [2.0]], [[1, 3], [0]])) == [
        TokenScores([0.0, 0.5, 0.0, 4.0]),
        TokenScores([2.0]),
    ]


def _rows(masks: list[list[int]], rewards: list[list[float]], ends: list[list[int]]) -> Any:
    columns = {"episode/reward": [None] * 4, "episode/turn_rewards": [*rewards, None, None]}
    made = rollouts(columns=columns | {"episode/turn_ends": [*ends, [], []]}).select(range(len(masks)))
    made.masks = masks
    return made


def test_the_reward_of_a_turn_that_does_not_train_counts_for_the_turn_before() -> None:
    found = load_plugin("rewards", "episode")(_rows([[1, 1, 0, 0]], [[0.5, 4.0]], [[1, 3]]))
    assert found == [TokenScores([0.0, 4.5, 0.0, 0.0])]


@pytest.mark.parametrize("silent", ["nothing", "no training"])
def test_agents_that_do_not_train_have_no_row(silent: str) -> None:
    async def alone(task: Task, model: Model) -> float:
        await model(task.messages, agent="first")
        if silent == "no training":
            await model(task.messages, agent="second", train=False)
        return 1.0

    c = play(Duel(function=alone), group=2).completions
    assert c.columns["episode/agent"] == ["first"] * 2
    assert c.columns["episode/reward"] == [1.0] * 2


def test_an_episode_that_is_over_ends_for_all_its_agents() -> None:
    played = play(Duel(function=duel, max_turns=2))
    assert played.completions.finish_reasons == ["length", "length"]
    assert played.completions.columns["episode/end"] == ["over", "over"]
    assert played.completions.columns["episode/reward"] == [None, None]


def test_an_agent_is_refused_by_name_with_those_that_there_are() -> None:
    async def typo(task: Task, model: Model) -> None:
        await model(task.messages, agent="frist")

    with pytest.raises(EnvironmentFailure, match=r"agent='frist', which must be one of its agents \(first, second\)"):
        play(Duel(function=typo))


def test_tokens_are_bounded_in_each_conversation() -> None:
    async def many(task: Task, model: Model) -> None:
        for words in ("a", "bbbbbbbb"):
            await model([user(words)])

    played = play(Played1(function=many, max_tokens=6), Says(texts=("xxxxxxx",)))
    assert played.completions.columns["episode/end"] == ["over"]
    assert len(played.completions.ids[0]) == 6


def test_choices_of_a_request_are_turns_and_forks() -> None:
    def agent(task: Task, model: Any) -> float:
        body = {"messages": task.messages, "n": 3, "model": "m"}
        found = httpx.post(f"{model.url}/chat/completions", json=body, trust_env=False, timeout=scaled(30)).json()
        said = found["choices"]
        assert [choice["index"] for choice in said] == [0, 1, 2]
        again = {"messages": [*task.messages, said[1]["message"], user("go")]}
        httpx.post(f"{model.url}/chat/completions", json=again, trust_env=False, timeout=scaled(30))
        return float(len({choice["message"]["content"] for choice in said}))

    c = play(Plain(function=agent), Says(texts=("x", "y", "z", "w"))).completions
    assert c.columns["episode/reward"] == [3.0]
    assert text(c.ids[0]) == f"x{END}y{END}z{END}w{END}"
    assert c.forks is not None
    assert [(start, text(ids)) for start, ids in c.forks[0]] == [(2, "ab"), (4, "ab"), (6, f"aby{END}go")]
