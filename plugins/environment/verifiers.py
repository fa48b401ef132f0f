"""Environments of the package `verifiers` (its `verifiers.v1`, from version 0.4): a harness plays, its task scores.

The harness speaks to the policy at `Model.url`, through the package's own interception server; tokens are kept by the host as
those of any agent. A row names its task by number, in the order in which the taskset yields them. The reward is the weighted
sum of the task's rewards, its metrics are columns `episode/metrics/<name>`. Departures: the policy samples as the recipe
says, and an episode has one agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, Environment, Model, Outcome, Task

from ._held import Held, first_of

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm

NO_KEY = "HF_RLHF_NO_API_KEY"
"""Environment variable of the key, which is not set: the policy's server needs none."""


@dataclass(kw_only=True)
class OfVerifiers(Environment):
    """Plays the tasks of a taskset of `verifiers` with its harness, or one that `settings` names."""

    name = "verifiers"
    words = "tasks of {taskset}"

    taskset: str
    """Id of the taskset: an installed package, which is imported and run."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of the environment, as `verifiers` names them, such as {agent: {harness: {id: "null"}}}."""
    column: str = "task"
    """Dataset column with the number of the row's task, from 0."""

    def columns(self) -> set[str]:
        return {self.column}

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield reasons why the environment cannot be loaded."""
        try:
            _ = self._tasks
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            yield f"taskset {self.taskset!r} needs the package {package}. Run pip install {package}"
        except Exception as error:  # of a package's own kinds
            yield f"taskset {self.taskset!r} cannot be loaded: {first_of(error)}"

    def setup(self, context: Context) -> None:
        _ = self._held

    def close(self) -> None:
        if "_held" in self.__dict__:
            self._held.close()
            del self.__dict__["_held"]

    async def play(self, task: Task, model: Model) -> Outcome:
        number, url = task.columns[self.column], await asyncio.to_thread(lambda: model.url)
        if not 0 <= number < len(self._tasks):
            raise ValueError(f"column {self.column!r} must be from 0 to {len(self._tasks) - 1}, got {number!r}")
        episode = await asyncio.wrap_future(self._held.begin(self._episode(self._tasks[number], url)))
        traces = list(episode.traces)
        errors = [*episode.errors, *(error for trace in traces for error in trace.errors)]
        if not episode.ok:
            raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors) or "the episode failed")
        if len(traces) != 1:
            raise ValueError(f"an episode must have one agent, got {len(traces)}")
        metrics = {f"metrics/{name}": value for name, value in traces[0].metrics.items()}
        return Outcome(reward=traces[0].reward, columns=metrics)

    async def _episode(self, task: Any, url: str) -> Any:
        from verifiers import v1

        client = v1.EvalClientConfig(base_url=url, api_key_var=NO_KEY)
        return await self._loaded.run_episode(task, v1.ModelContext(model="policy", client=client))

    @cached_property
    def _loaded(self) -> Any:
        from verifiers.v1.utils.loaders import load_environment, resolve_env_config

        taskset = {**self.settings.get("taskset", {}), "id": self.taskset}
        return load_environment(resolve_env_config({**self.settings, "taskset": taskset}))

    @cached_property
    def _tasks(self) -> list[Any]:
        if not self._loaded.taskset.bounded:
            raise ValueError("it yields tasks forever: a row must name one by its number")
        return list(self._loaded.taskset)

    @cached_property
    def _held(self) -> Held:
        def serving() -> AbstractAsyncContextManager[Any]:
            return self._loaded.serving()

        return Held(serving, "hf_rlhf-verifiers")


@hookimpl
def environment() -> list[type[Environment]]:
    return [OfVerifiers]
