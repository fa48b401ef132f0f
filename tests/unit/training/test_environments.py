"""Episodes: what the policy is asked, what of an episode becomes a row, and how one ends."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from typing import Any

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import Model, Outcome, Over, Task, Turn
from hf_rlhf.batch import TokenScores
from hf_rlhf.testing import rollouts
from hf_rlhf.training.environments.episode import EnvironmentFailure
from hf_rlhf.training.environments.turns import turn_columns
from tests.helpers.environments import Plain, Played1, ReadsTurns, Says, play, policy


def text(ids: list[int]) -> str:
    return str(policy().tokenizer.decode(ids))


async def twice(task: Task, model: Model) -> float:
    """Two turns, and a word between them."""
    first = await model(task.messages)
    await model([*task.messages, first, {"role": "user", "content": "cd"}])
    return 1.0


def test_the_policys_tokens_have_mask_1_and_what_the_environment_says_has_mask_0():
    played = play(Played1(function=twice), Says(texts=("x", "yz")))
    (ids,), (mask,) = played.completions.ids, played.completions.masks
    end = policy().tokenizer.eos_token
    assert text(ids) == f"x{end}cdyz{end}"
    assert mask == [1, 1, 0, 0, 1, 1, 1]
    assert played.completions.logps == [[-1.0, -2.0, 0.0, 0.0, -1.0, -2.0, -3.0]]
    assert played.completions.exact
    assert [message["content"] for message in played.messages[0]] == ["ab", "x", "cd", "yz"]
    assert played.completions.columns["episode/turn_ends"] == [[1, 6]]
    assert played.completions.columns["episode/reward"] == [1.0]


def test_equal_questions_of_a_group_are_one_prompt_and_others_are_asked_row_by_row():
    rows = itertools.count()

    async def uneven(task: Task, model: Model) -> None:
        row = next(rows)
        said = await model(task.messages)
        if row > 0:
            await model([*task.messages, said, {"role": "user", "content": str(row)}])

    engine = Says()
    play(Played1(function=uneven), engine, prompts=("ab", "c"), group=2)
    end = policy().tokenizer.eos_token
    assert engine.calls == [(["ab", "c"], 2), ([f"abhi{end}1", f"chi{end}2", f"chi{end}3"], 1)]


def test_a_message_says_how_the_turn_ended_and_its_number():
    seen: list[Any] = []

    async def note(task: Task, model: Model) -> None:
        seen.append(await model(task.messages, max_tokens=2))
        seen.append(await model([*task.messages, seen[0], {"role": "user", "content": "c"}], stop=["e"]))

    played = play(Played1(function=note), Says(texts=("abcdefg",)))
    assert [(m["content"], m["finish_reason"], m["turn"]) for m in seen] == [("ab", "length", 0), ("abcde", "stop", 1)]
    assert text(played.completions.ids[0]) == "abcabcde"


@pytest.mark.parametrize(("bounds", "turns"), [({"max_turns": 3}, 3), ({"max_tokens": 7}, 2)])
def test_turns_and_tokens_are_bounded_and_over_ends_an_episode_without_a_score(bounds, turns):
    async def endless(task: Task, model: Model) -> float:
        messages = list(task.messages)
        while True:
            messages += [await model(messages), {"role": "user", "content": "c"}]

    played = play(Played1(function=endless, **bounds))
    columns = played.completions.columns
    assert len(columns["episode/turn_ends"][0]) == turns
    assert columns["episode/end"] == ["over"]
    assert columns["episode/reward"] == [None]
    assert played.completions.finish_reasons == ["length"]
    assert len(played.completions.ids[0]) <= bounds.get("max_tokens", 99)


def test_an_environment_that_catches_over_gives_a_score():
    async def patient(task: Task, model: Model) -> float:
        said = await model(task.messages)
        with pytest.raises(Over):
            await model([*task.messages, said, {"role": "user", "content": "c"}])
        return 0.25

    played = play(Played1(function=patient, max_turns=1))
    assert played.completions.columns["episode/reward"] == [0.25]
    assert played.completions.columns["episode/end"] == ["played"]


def test_a_turn_that_is_not_trained_has_mask_0():
    async def asks(task: Task, model: Model) -> None:
        said = await model(task.messages, train=False)
        await model([*task.messages, said, {"role": "user", "content": "c"}])

    assert play(Played1(function=asks)).completions.masks == [[0, 0, 0, 0, 1, 1, 1]]


def test_a_plain_play_runs_in_a_thread_and_gives_the_same_rows():
    names = []

    def plain(task: Task, model: Any) -> float:
        names.append(threading.current_thread().name)
        first = model(task.messages)
        model([*task.messages, first, {"role": "user", "content": "cd"}])
        return 1.0

    one, other = play(Plain(function=plain), group=3), play(Played1(function=twice), group=3)
    assert one.completions.ids == other.completions.ids
    assert one.completions.masks == other.completions.masks
    assert one.completions.columns["episode/reward"] == [1.0] * 3
    assert len(names) == 3
    assert threading.main_thread().name not in names


def test_the_seed_depends_on_run_rollout_group_and_row_alone():
    seeds: list[int] = []

    async def note(task: Task, model: Model) -> None:
        seeds.append(task.seed)
        random.random()
        await model(task.messages)

    for place in [(0, "rollout", 0, 0), (0, "rollout", 0, 0), (0, "rollout", 1, 0), (1, "rollout", 0, 0)]:
        play(Played1(function=note), prompts=("a", "b"), group=2, place=place)
    assert seeds[:4] == seeds[4:8]
    assert len(set(seeds)) == 12


def one_fails(kind: str):
    """Row 1 of a group does not play as it should, the others do."""
    rows = itertools.count()

    async def play_one(task: Task, model: Model) -> float:
        row = next(rows)
        await model(task.messages)
        if row == 1 and kind == "raises":
            raise RuntimeError("no network")
        if row == 1 and kind == "exits":
            raise SystemExit
        if row == 1 and kind == "hangs":
            await asyncio.sleep(60)
        return 1.0

    return play_one


@pytest.mark.parametrize(("kind", "end"), [("raises", "error"), ("exits", "error"), ("hangs", "timeout")])
@pytest.mark.parametrize(("on_error", "reward"), [("none", None), (-1.0, -1.0)])
def test_an_episode_that_fails_costs_itself_alone(kind, end, on_error, reward):
    played = play(Played1(function=one_fails(kind), timeout=0.2, on_error=on_error), group=3)
    assert played.completions.columns["episode/end"] == ["played", end, "played"]
    assert played.completions.columns["episode/reward"] == [1.0, reward, 1.0]
    assert all(played.completions.ids)


def test_on_error_raise_ends_the_run_with_the_cause():
    with pytest.raises(EnvironmentFailure, match="environment=played raised RuntimeError: no network"):
        play(Played1(function=one_fails("raises"), on_error="raise"), group=3)


def test_a_thread_that_blocks_is_abandoned():
    rows = itertools.count()
    free = threading.Event()

    def blocks(task: Task, model: Any) -> float:
        row = next(rows)
        model(task.messages)
        if row == 0:
            free.wait(60)
            with pytest.raises(Over):
                model(task.messages)
        return 1.0

    start = time.monotonic()
    played = play(Plain(function=blocks, timeout=0.3), group=2)
    assert time.monotonic() - start < 10
    assert played.completions.columns["episode/end"] == ["timeout", "played"]
    free.set()


def test_a_call_that_blocks_the_event_loop_does_not_end_the_run():
    async def blocks(task: Task, model: Model) -> float:
        await model(task.messages)
        time.sleep(1.5)
        return 1.0

    start = time.monotonic()
    played = play(Played1(function=blocks, timeout=0.2), group=2)
    assert time.monotonic() - start < 1.4
    assert played.completions.columns["episode/end"] == ["timeout", "timeout"]


def test_a_rollout_in_which_all_episodes_fail_ends_the_run():
    async def broken(task: Task, model: Model) -> float:
        raise KeyError("port")

    with pytest.raises(EnvironmentFailure, match="all 8 episodes failed: the first raised KeyError"):
        play(Played1(function=broken), group=8)


def test_an_episode_without_a_turn_is_a_row_without_a_sampled_token():
    async def silent(task: Task, model: Model) -> float:
        return 1.0

    assert play(Played1(function=silent)).completions.masks == [[0]]


def test_rows_that_no_environment_takes_are_answered_once():
    one = Played1(function=twice, when={"kind": "talk"})
    played = play([one], prompts=("ab", "c"), columns={"kind": ["talk", "other"]})
    assert played.completions.columns["episode/environment"] == ["played", None]
    assert played.completions.masks[1] == [1, 1, 1]
    assert [message["content"] for message in played.messages[1]] == ["c", "hi"]


def test_the_first_environment_that_takes_a_row_plays_it():
    first, second = Played1(function=twice, when={"kind": ["a", "b"]}), Plain(function=lambda task, model: None)
    played = play([first, second], prompts=("ab", "c"), columns={"kind": ["a", "z"]})
    assert played.completions.columns["episode/environment"] == ["played", "plain"]


def test_at_most_max_live_episodes_play_at_a_time():
    live = peak = 0

    async def count(task: Task, model: Model) -> None:
        nonlocal live, peak
        live += 1
        peak = max(peak, live)
        await model(task.messages)
        live -= 1

    engine = Says()
    play(Played1(function=count, max_live=2), engine, group=5)
    assert peak == 2
    assert [generations for _, generations in engine.calls] == [2, 2, 1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("well", "must return an Outcome, a number or None, got 'well'"),
        (Outcome(columns={"end": 1, "mine": 2}), "must have other names than .*, got end"),
        (Outcome(turns=[Turn(), Turn()]), r"one Turn for each turn of the policy \(1\), got 2"),
        (float("nan"), "must be finite numbers"),
        (Outcome(reward={"other": 1.0}), r"must reward its agents \(policy\), got \['other'\]"),
        (Outcome(reward={"policy": "much"}), "must return an Outcome, a number or None"),
    ],
)
def test_wrong_outcomes_end_the_run_naming_the_environment(given, words):
    async def wrong(task: Task, model: Model) -> Any:
        await model(task.messages)
        return given

    with pytest.raises(EnvironmentFailure, match=f"environment=played.*{words}"):
        play(Played1(function=wrong))


async def as_other(task: Task, model: Model) -> None:
    await model(task.messages, agent="judge")


async def catches(task: Task, model: Model) -> float:
    try:
        await as_other(task, model)
    except Exception:
        return 1.0
    return 0.0


def test_an_environment_cannot_catch_the_refusal():
    with pytest.raises(EnvironmentFailure, match=r"asks as agent='judge', which must be one of its agents \(policy\)"):
        play(Played1(function=catches))


def test_one_reward_per_turn_is_kept_by_turn():
    async def paid(task: Task, model: Model) -> Outcome:
        said = await model(task.messages)
        await model([*task.messages, said, {"role": "user", "content": "c"}])
        return Outcome(turns=[Turn(reward=0.5), Turn(reward=2.0)], columns={"tries": 2})

    columns = play(Played1(function=paid)).completions.columns
    assert columns["episode/turn_rewards"] == [[0.5, 2.0]]
    assert columns["episode/tries"] == [2]


def test_a_turn_begins_in_the_state_that_it_names_or_else_in_the_conversation_that_was_asked():
    rows = itertools.count()

    async def named(task: Task, model: Model) -> Outcome:
        row, messages, turns = next(rows), list(task.messages), []
        for k in range(2):
            messages += [await model(messages), {"role": "user", "content": "c" if row < 2 else "d"}]
            turns.append(Turn(state="door" if k == row == 0 else None))
        return Outcome(turns=turns)

    chosen = [Played1(function=named, when={"take": "yes"})]
    columns = {"take": ["yes", "no"]}
    silent = play(chosen, prompts=("ab", "c"), group=3, columns=columns)
    assert "episode/turn_states" not in silent.completions.columns
    rows = itertools.count()
    found = play(chosen, prompts=("ab", "c"), group=3, columns=columns, advantages=ReadsTurns())
    states = found.completions.columns["episode/turn_states"]
    assert states[0][0] != states[1][0] == states[2][0]
    assert states[0][1] == states[1][1] != states[2][1]
    assert states[3] == states[4] == states[5] != states[0]
    as_rows = rollouts(columns={**found.completions.columns})
    as_rows.completion_ids, as_rows.group_ids = found.completions.ids, [0, 0, 0, 1, 1, 1]
    assert found.completions.columns["episode/turn_ends"] == [[2, 6]] * 3 + [[2]] * 3
    numbers = turn_columns(as_rows, {"turns", "states"})
    assert numbers["turns"] == [[0, 0, 0, 1, 1, 1, 1]] * 3 + [[0, 0, 0]] * 3
    assert [[row[0], row[-1]] for row in numbers["states"]] == [[0, 1], [2, 1], [2, 3], [0, 0], [0, 0], [0, 0]]
    assert turn_columns(as_rows, {"turns"}) == {"turns": numbers["turns"]}
    assert turn_columns(as_rows, {"values"}) == {}


@pytest.mark.proves("rewards.episode", how="closed form", tolerance="0")
def test_the_episodes_reward_is_the_environments_by_turn_or_whole_and_never_a_guess():
    columns = {
        "episode/reward": [0.75, None, None, 2.0],
        "episode/turn_rewards": [None, [0.25, 1.0], None, [0.5]],
        "episode/turn_ends": [[0], [0, 1], [], [0]],
    }
    rows = rollouts(columns=columns)
    rows.completion_ids = [[4], [4, 5], [4], [4, 5, 6]]
    rows.masks = [[1] * len(ids) for ids in rows.completion_ids]
    found = load_plugin("rewards", "episode")(rows)
    assert found == [0.75, TokenScores([0.25, 1.0]), None, TokenScores([0.5, 0.0, 0.0])]


@pytest.mark.proves("environment.second_chance", how="closed form", tolerance="0")
@pytest.mark.parametrize(
    ("texts", "attempts", "rewards"),
    [
        (("x",), 2, [1.0]),
        (("y", "x"), 2, [0.0, 0.5]),
        (("y", "z"), 2, [0.0, 0.0]),
        (("y", "z", "x"), 3, [0.0, 0.0, 0.25]),
    ],
)
def test_attempt_k_is_worth_decay_to_the_k_if_it_is_right(texts, attempts, rewards):
    chosen = load_plugin("environment", "second_chance", attempts=attempts, decay=0.5)
    found = play(chosen, Says(texts=texts), columns={"answer": ["x"]}).completions.columns
    assert found["episode/turn_rewards"] == [rewards]
    assert found["episode/attempts"] == [len(rewards)]
