"""Several questions of one episode at a time: they are decoded together, and whoever ends early takes nobody along."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from hf_rlhf.axes import Model, Over, Task
from tests.helpers.environments import AtOnce, Hashed, Plain, Played1, Says, play
from tests.helpers.episodes import user
from tests.helpers.waits import scaled


def test_questions_of_an_episode_at_a_time_are_decoded_together_and_equal_ones_of_a_group_are_one_prompt():
    engine = Says(texts=("hi", "yo"))
    played = play(AtOnce(), engine, prompts=("ab", "c"), group=3)
    assert engine.calls[0] == (["ab", "z", "c", "z"], 3)
    assert [generations for _, generations in engine.calls] == [3, 3]
    columns = played.completions.columns
    assert columns["episode/agent"] == ["first", "second"] * 6
    assert columns["episode/reward"] == [1.0, 0.0] * 6
    assert [len(ends) for ends in columns["episode/turn_ends"]] == [2] * 12
    assert [messages[2]["content"] for messages in played.messages] == ["hi"] * 12


def test_they_are_the_same_in_every_run():
    one, other = (play(AtOnce(), Hashed(), prompts=("ab", "c"), group=4).completions for _ in range(2))
    assert (one.ids, one.masks) == (other.ids, other.masks)


def test_the_same_question_twice_is_a_fork_and_each_counts_as_a_turn():
    async def twice(task: Task, model: Model) -> int:
        found = await asyncio.gather(*(model(task.messages) for _ in range(3)), return_exceptions=True)
        return sum(isinstance(answer, Over) for answer in found)

    played = play(Played1(function=twice, max_turns=2))
    assert played.completions.columns["episode/reward"] == [1]
    assert [len(forks) for forks in played.completions.forks or []] == [1]


@dataclass(kw_only=True)
class Waits(Says):
    """Decodes its first call until `asked` is set, and shortly longer."""

    asked: threading.Event

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.calls:
            assert self.asked.wait(20)
        return super().__call__(*args, **options)


@dataclass(kw_only=True)
class Tells(Waits):
    """Sets `decoding` when it decodes."""

    decoding: threading.Event

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.decoding.set()
        return super().__call__(*args, **options)


def test_a_question_that_is_asked_while_the_engine_decodes_waits_for_the_next_turn():
    decoding, asked = threading.Event(), threading.Event()

    async def play_slowly(task: Task, model: Model) -> str:
        async def later() -> Any:
            while not decoding.is_set():
                await asyncio.sleep(0.001)
            answer = asyncio.ensure_future(model([user("late")]))
            await asyncio.sleep(0)
            asked.set()
            return await answer

        first, second = await asyncio.gather(model(task.messages), later())
        return f"{first['turn']}{second['turn']}"

    engine = Tells(asked=asked, decoding=decoding)
    played = play(Played1(function=play_slowly, timeout=20), engine)
    assert played.completions.columns["episode/reward"] == [1]
    assert [texts for texts, _ in engine.calls] == [["ab"], ["late"]]


@pytest.mark.parametrize("outcome", ["error", "played"])
def test_an_episode_may_end_with_a_question_open(outcome: str):
    async def ends(task: Task, model: Model) -> float:
        question = asyncio.ensure_future(model(task.messages))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if task.columns["ends"]:
            if outcome == "error":
                raise OSError("gone")
            return 2.0
        await question
        return 1.0

    played = play(Played1(function=ends), prompts=("ab", "c"), group=2, columns={"ends": [True, False]})
    assert played.completions.columns["episode/end"] == [outcome] * 2 + ["played"] * 2
    assert played.completions.columns["episode/reward"] == [None if outcome == "error" else 2.0] * 2 + [1.0] * 2


def test_an_episode_may_end_while_the_engine_decodes_its_question():
    decoding, ended = threading.Event(), threading.Event()

    async def gives_up(task: Task, model: Model) -> float:
        question = asyncio.ensure_future(model(task.messages))
        if not task.columns["ends"]:
            return float((await question)["turn"])
        while not decoding.is_set():
            await asyncio.sleep(0.001)
        asyncio.get_running_loop().call_later(0.05, ended.set)
        return 2.0

    engine = Tells(asked=ended, decoding=decoding)
    played = play(Played1(function=gives_up), engine, prompts=("ab", "c"), columns={"ends": [True, False]})
    assert played.completions.columns["episode/reward"] == [2.0, 0.0]
    assert [sum(mask) for mask in played.completions.masks or []] == [0, 3]


def test_a_blocked_event_loop_ends_the_episode_that_blocks_it_and_not_one_whose_questions_are_open():
    release = threading.Event()

    async def blocks(task: Task, model: Model) -> float:
        if task.columns["blocks"]:
            await asyncio.sleep(0)
            release.wait(20)
        await asyncio.gather(model(task.messages), model(task.messages))
        return 1.0

    class Frees(Says):
        def __call__(self, *args: Any, **options: Any) -> Any:
            release.set()
            return super().__call__(*args, **options)

    columns = {"blocks": [False, True]}
    played = play(Played1(function=blocks, timeout=scaled(0.15)), Frees(), prompts=("ab", "c"), columns=columns)
    assert played.completions.columns["episode/end"] == ["played", "timeout"]


def test_threads_of_a_plain_environment_may_ask_at_the_same_time():
    def threads(task: Task, model: Any) -> float:
        with ThreadPoolExecutor(3) as pool:
            turns = list(pool.map(lambda i: model([user(f"{i}")])["turn"], range(3)))
        return float(sorted(turns) == [0, 1, 2])

    played = play(Plain(function=threads), group=4)
    assert played.completions.columns["episode/reward"] == [1.0] * 4
