"""Settings of the environments with tools: what becomes of episodes in which the policy calls them."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import Task
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers import environments
from tests.helpers.environments import Doubling, Says

COLUMNS = {"answer": ["yes", "no"], "other": ["6", "no"], "kind": ["a", "b"]}


def seen(environment: Any, *texts: str) -> Any:
    """Everything that becomes of two episodes, and what the engine was asked."""
    engine = Says(texts=texts or ("no", "yes"))
    try:
        made = environments.play(environment, engine, prompts=("ab", "cd"), columns=COLUMNS).completions
    finally:
        environment.close()
    columns = {name: values for name, values in made.columns.items() if name != "episode/environment"}
    return made.ids, made.masks, columns, engine.calls


def double(x: int) -> int:
    """Double.

    Args:
        x: A number.
    """
    return 2 * x


async def slow(seconds: float) -> str:
    """Sleep.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return "slept"


class Silent(Doubling):
    def double(self, x: int) -> str:
        """Say nothing.

        Args:
            x: A number.
        """
        return ""


def of(name: str, setting: str, first: Any, second: Any, *texts: str, **settings: Any) -> None:
    def show(folder: Path, value: Any) -> Any:
        return seen(load_plugin("environment", name, **{**settings, setting: value}), *texts)

    EFFECTS[f"environment.{name}.{setting}"] = SettingEffect(first, second, show)


CALL, INLINE = ("[double(3)]", "6"), {"tools": [double], "workers": "inline"}
of("tools", "tools", [double], [slow], *CALL, workers="inline")
of("tools", "python", None, {}, "[python(print(3))]", "6", **INLINE)
of("tools", "answer", None, "other", *CALL, **INLINE)
of("tools", "max_result", 4000, 3, "[double('abcdef')]", "6", **INLINE)
of("tools", "tool_timeout", 20.0, 0.05, "[slow(0.3)]", "6", tools=[slow])
of("trl", "factory", Doubling, Silent, *CALL)
of("trl", "max_result", 4000, 3, "[double('abcdef')]", "6", factory=Doubling)


def tools_of_servers(folder: Path, places: list[str]) -> Any:
    """The tools, with a stand-in for the package `mcp`, whose servers have one that is named as their command."""

    class Client:
        def __init__(self, server: Any):
            self.server = server

        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: Any) -> None:
            pass

        async def list_tools(self) -> Any:
            tool = SimpleNamespace(name=self.server.command, description="", input_schema={"type": "object"})
            return SimpleNamespace(tools=[tool])

    with pytest.MonkeyPatch.context() as patch:
        fake = SimpleNamespace(Client=Client, StdioServerParameters=SimpleNamespace)
        patch.setitem(sys.modules, "mcp", fake)
        plugin = load_plugin("environment", "tools", tools=[double], mcp=places)
        found = [schema["function"]["name"] for schema in plugin.tool_schemas()]
        plugin.close()
    return found


EFFECTS["environment.tools.mcp"] = SettingEffect([], ["search"], tools_of_servers)


class Verifiers:
    """A stand-in for the package `verifiers`, whose tasks score their number plus one of the configuration."""

    def __init__(self, config: Any):
        self.config = config
        self.taskset = type("Taskset", (list,), {"bounded": True})([0, 1])

    @asynccontextmanager
    async def serving(self) -> Any:
        yield

    async def run_episode(self, task: int, context: Any) -> Any:
        reward = task + self.config.get("more", 0) + len(self.config["taskset"]["id"])
        return SimpleNamespace(ok=True, errors=[], traces=[SimpleNamespace(errors=[], reward=reward, metrics={})])


def of_verifiers(setting: str, first: Any, second: Any) -> None:
    def show(folder: Path, value: Any) -> Any:
        v1 = SimpleNamespace(EvalClientConfig=SimpleNamespace, ModelContext=SimpleNamespace)
        loaders = SimpleNamespace(load_environment=Verifiers, resolve_env_config=dict)
        with pytest.MonkeyPatch.context() as patch:
            for name, fake in (
                ("", SimpleNamespace(v1=v1)),
                (".v1", v1),
                (".v1.utils", v1),
                (".v1.utils.loaders", loaders),
            ):
                patch.setitem(sys.modules, f"verifiers{name}", fake)
            plugin = load_plugin("environment", "verifiers", **{"taskset": "a", setting: value})
            columns, task = {"task": 0, "other": 1}, {"role": "user", "content": "q"}
            try:
                made = Task(messages=[task], columns=columns, seed=0)
                return asyncio.run(plugin.play(made, SimpleNamespace(url="http://localhost"))).reward
            finally:
                plugin.close()

    EFFECTS[f"environment.verifiers.{setting}"] = SettingEffect(first, second, show)


of_verifiers("taskset", "a", "bb")
of_verifiers("settings", {}, {"more": 1})
of_verifiers("column", "task", "other")


def showing(setting: str, first: Any, second: Any) -> Any:
    def take(show: Any) -> Any:
        EFFECTS[f"environment.tools.{setting}"] = SettingEffect(first, second, show)
        return show

    return take


@showing("workers", "processes", "inline")
def who_runs_it(folder: Path, workers: str) -> Any:
    (folder / "who.py").write_text(
        'import os\ndef who() -> int:\n    """Tell the process."""\n    return os.getpid()\n'
    )
    plugin = load_plugin("environment", "tools", tools=[f"{folder}/who.py:who"], workers=workers)
    return seen(plugin, "[who()]", "6")[0]


@showing("num_workers", 1, 2)
def how_many_run(folder: Path, num_workers: int) -> Any:
    (folder / "mine.py").write_text('def one() -> int:\n    """Count."""\n    return 1\n')
    plugin = load_plugin("environment", "tools", tools=[f"{folder}/mine.py:one"], num_workers=num_workers)
    call = {"type": "function", "function": {"name": "one", "arguments": {}}}
    answers = [{"role": "assistant", "content": "", "tool_calls": [call] * 2}, {"role": "assistant", "content": ""}]

    async def model(messages: Any, **options: Any) -> Any:
        return answers.pop(0)

    asyncio.run(plugin.play(Task(messages=[{"role": "user", "content": "q"}], columns={}, seed=0), model))
    started = len(plugin._pool._pool._workers)
    plugin.close()
    return started


@showing("retries", 2, 0)
def how_often_it_is_tried(folder: Path, retries: int) -> Any:
    tried = []

    async def gone(x: int) -> int:
        """Fail.

        Args:
            x: A number.
        """
        tried.append(x)
        raise ConnectionError("gone")

    seen(load_plugin("environment", "tools", tools=[gone], retries=retries), "[gone(1)]", "6")
    return len(tried)
