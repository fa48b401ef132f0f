"""Episodes that run free: an engine with `sample` gets each question when it is asked."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from hf_rlhf.axes import Environment, Model, Task
from tests.helpers.environments import AtOnce, Duel, Forking, Hashed, Plain, Played1, Served, play
from tests.helpers.episodes import user
from tests.helpers.waits import scaled


@pytest.mark.parametrize("environment", [Forking(), Duel(), AtOnce()], ids=lambda x: x.name)
def test_rows_are_those_of_lockstep_whatever_the_order_of_answers(environment: Environment) -> None:
    free, lockstep = (play(environment, engine, prompts=("ab", "c", "d")) for engine in (Served(), Hashed()))
    one, other = free.completions, lockstep.completions
    for name in ("ids", "masks", "forks", "agents", "episodes", "finish_reasons"):
        assert getattr(one, name) == getattr(other, name)
    assert one.columns == other.columns


def test_threads_play_freely() -> None:
    def twice(task: Task, model: Any) -> float:
        first = model(task.messages)
        return float(model([*task.messages, first, user("c")])["turn"])

    assert play(Plain(function=twice), Served(), group=3).completions.columns["episode/reward"] == [1.0] * 3


def test_an_engine_that_fails_ends_the_rollout() -> None:
    with pytest.raises(ConnectionError, match="the server is gone"):
        play(AtOnce(), Served(fails=True), group=2)


def test_an_episode_may_end_with_a_question_open_and_a_hanging_one_is_given_up() -> None:
    async def ends(task: Task, model: Model) -> float:
        question = asyncio.ensure_future(model(task.messages))
        await asyncio.sleep(0)
        if task.columns["does"] == "hangs":
            await question
            await asyncio.Event().wait()
        elif task.columns["does"] == "leaves":
            return 2.0
        return float((await question)["turn"])

    columns = {"does": ["leaves", "hangs", "waits"]}
    played = play(Played1(function=ends, timeout=scaled(0.15)), Served(), prompts=("ab", "c", "d"), columns=columns)
    assert played.completions.columns["episode/end"] == ["played", "timeout", "played"]
    assert played.completions.columns["episode/reward"] == [2.0, None, 0.0]


def test_what_an_environment_draws_leaves_the_runs_random_numbers_alone() -> None:
    def draws(task: Task, model: Any) -> float:
        return random.random() * model(task.messages)["turn"]

    before = random.getstate()
    play(Plain(function=draws), Served(), group=2)
    assert random.getstate() == before
