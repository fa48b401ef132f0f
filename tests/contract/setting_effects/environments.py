"""Settings of environments, in episodes with an engine that says the same at every call."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_rlhf import load_plugin
from hf_rlhf.axes import Model, Task
from hf_rlhf.testing import rollouts
from hf_rlhf.training.environments.episode import EnvironmentFailure
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers.environments import Played1, Says, opened, play
from tests.helpers.episodes import episode_tokenizer, user
from tests.helpers.talks import Talk


async def endless(task: Task, model: Model) -> float:
    messages = list(task.messages)
    while True:
        messages += [await model(messages), {"role": "user", "content": "c"}]


async def fails(task: Task, model: Model) -> float:
    await model(task.messages)
    raise RuntimeError


async def slow(task: Task, model: Model) -> float:
    await model(task.messages)
    await asyncio.sleep(0.2)
    return 1.0


def rows(function: Callable[..., Any], setting: str) -> Callable[[Path, Any], Any]:
    """What becomes of three episodes of a function."""

    def show(folder: Path, value: Any) -> Any:
        engine = Says()
        try:
            found = play(Played1(function=function, **{setting: value}), engine, group=3, columns={"kind": ["talk"]})
        except EnvironmentFailure as error:
            return str(error)
        return found.completions.ids, found.completions.columns, [generations for _, generations in engine.calls]

    return show


async def thinks(task: Task, model: Model) -> None:
    await model([*task.messages, await model(task.messages), {"role": "user", "content": "again"}])


def rendered(folder: Path, history: str) -> Any:
    """Forks of a conversation whose chat template drops earlier thoughts."""
    tokenizer = episode_tokenizer("qwen3")
    engine, chosen = Says(texts=("<think>\nhm\n</think>\n\nyes",)), Played1(function=thinks, history=history)  # type: ignore[arg-type]
    return play(chosen, engine, prompts=([user("hi")],), tokenizer=tokenizer).completions.forks


EFFECTS |= {
    "environment.when": SettingEffect({"kind": "talk"}, {"kind": "other"}, rows(endless, "when")),
    "environment.max_turns": SettingEffect(8, 2, rows(endless, "max_turns")),
    "environment.max_tokens": SettingEffect(4096, 9, rows(endless, "max_tokens")),
    "environment.history": SettingEffect("extend", "as_rendered", rendered),
    "environment.max_live": SettingEffect(None, 2, rows(endless, "max_live")),
    "environment.timeout": SettingEffect(60.0, 0.05, rows(slow, "timeout")),
    "environment.on_error": SettingEffect("none", "raise", rows(fails, "on_error")),
}


def in_processes(folder: Path, count: int) -> int:
    """Episodes at a time."""
    engine = Says(texts=("x", "yz"))
    with opened(Talk(workers="processes", num_workers=count)) as environment:
        play(environment, engine, ["a", "b"], columns={"does": ["", ""]})
    return len(engine.calls[0][0])


def own_process(folder: Path, workers: str) -> bool:
    with opened(Talk(workers=workers, num_workers=1)) as environment:
        found = play(environment, Says(texts=("x", "yz")), columns={"does": [""]})
    return found.completions.columns["episode/pid"] == [os.getpid()]


EFFECTS["environment.workers"] = SettingEffect("inline", "processes", own_process)
EFFECTS["environment.num_workers"] = SettingEffect(1, 2, in_processes)


def second_chance(setting: str) -> Callable[[Path, Any], Any]:
    """Rewards and conversation of an episode in which a later answer is right."""

    def show(folder: Path, value: Any) -> Any:
        columns = {"answer": ["x"], "other": ["y"]}
        found = play(
            load_plugin("environment", "second_chance", **{setting: value}),
            Says(texts=("y", "z", "x")),
            columns=columns,
        )
        return found.completions.columns, found.messages

    return show


for setting, first, second in (
    ("attempts", 2, 3),
    ("column", "answer", "other"),
    ("says", "no {prompt}", "wrong"),
):
    EFFECTS[f"environment.second_chance.{setting}"] = SettingEffect(first, second, second_chance(setting))


def decayed(folder: Path, decay: float) -> Any:
    chosen = load_plugin("environment", "second_chance", attempts=3, decay=decay)
    return play(chosen, Says(texts=("y", "z", "x")), columns={"answer": ["x"]}).completions.columns


EFFECTS["environment.second_chance.decay"] = SettingEffect(0.5, 0.25, decayed)


def guessing(setting: str) -> Callable[[Path, Any], Any]:
    """Conversation of a game in which the policy guesses 5, then 3."""

    def show(folder: Path, value: Any) -> Any:
        columns = {"secret": ["3"], "other": ["7"]}
        found = play(
            load_plugin("environment", "guessing", **{setting: value}), Says(texts=("5", "3")), columns=columns
        )
        return found.messages

    return show


for setting, first, second in (("column", "secret", "other"), ("lower", "lower", "<")):
    EFFECTS[f"environment.guessing.{setting}"] = SettingEffect(first, second, guessing(setting))


def guessed_below(folder: Path, higher: str) -> Any:
    chosen = load_plugin("environment", "guessing", higher=higher)
    return play(chosen, Says(texts=("5", "7")), columns={"secret": ["7"]}).messages


EFFECTS["environment.guessing.higher"] = SettingEffect("higher", ">", guessed_below)


def nim(setting: str) -> Callable[[Path, Any], Any]:
    """Games in which both agents take 1, then 3, and so on."""

    def show(folder: Path, value: Any) -> Any:
        columns = {"heap": ["6"], "other": ["2"]}
        chosen = load_plugin("environment", "nim", **{setting: value})
        found = play(chosen, Says(texts=("1", "3", "1")), columns=columns)
        return found.messages, found.completions.columns

    return show


for setting, first, second in (
    ("column", "heap", "other"),
    ("most", 3, 2),
    ("opponent", "policy", "perfect"),
    ("says", "{heap}:", "left: {heap}"),
):
    EFFECTS[f"environment.nim.{setting}"] = SettingEffect(first, second, nim(setting))


def turns(folder: Path, name: str) -> Any:
    return play(load_plugin("environment", name), columns={"answer": ["x"]}).completions.columns["episode/turn_ends"]


EFFECTS["environment.echo"] = SettingEffect("echo", "second_chance", turns)


def scores(folder: Path, name: str) -> Any:
    """Scores of rows that an environment gave other rewards than their text."""
    columns = {"answer": ["no"] * 4, "episode/reward": [0.5] * 4}
    columns |= {"episode/turn_rewards": [None] * 4, "episode/turn_ends": [[0]] * 4}
    return load_plugin("rewards", name)(rollouts(columns=columns))


EFFECTS["rewards.episode"] = SettingEffect("episode", "exact_match", scores)
