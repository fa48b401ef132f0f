"""Reward from a Python function: the user's own, or any written for TRL (`reward_funcs`).

Functions are called as in TRL: with the keyword arguments prompts, completions, completion_ids and every dataset column, of
which a function without `**kwargs` gets those that it names; completions of conversations are
`[{"role": "assistant", "content": ...}]`; async functions are awaited, concurrently with other async sources. Departures:
`trainer_state.global_step` counts rollouts, and values passed to `log_extra` and `log_metric` are logged under the
function's name (`take_logs`). A function whose only parameter is named `rollouts` gets `hf_rlhf.batch.Rollouts` instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts

from .._functions import load_function
from ._call import (
    PROVIDED,
    LazyState,
    Logs,
    Parameters,
    parameters,
    reads_state,
    trainer_state,
    trl_arguments,
)


@dataclass(kw_only=True)
class Function(RewardSource):
    """The numbers that the function returns, one per row, None where it does not apply."""

    name = "function"
    metrics = (Metric("<name>", "as the function's", "values that the function passes to `log_metric`", optional=True),)
    draws = True
    provided = PROVIDED

    function: str | Callable[..., Any]
    """`file.py:name`, `package.module:name`, or the function itself. A recipe's function is imported and run."""
    runs_model: bool = False
    """The function runs a model, the policy or another: call it after the policy's forwards instead of in parallel."""
    rowwise: bool = False  # type: ignore[misc]
    """Call the function once per row, so that a failing row affects no others; valid if a row's score depends on that row
    alone."""

    def __post_init__(self) -> None:
        self._logs = Logs()
        self._rollouts = 0
        if self.label is None:
            self.label = self._title.rpartition(":")[2] or None

    @property
    def asynchronous(self) -> bool:
        return any(map(inspect.iscoroutinefunction, (self._loaded, getattr(self._loaded, "__call__", None))))  # noqa: B004

    def columns(self) -> set[str]:
        """Return the parameters without a default that only a dataset column can fill."""
        return self._wanted.columns

    @property
    def reader(self) -> str:
        return f"reward function {self._title}"

    def prepare(self) -> None:
        """Load the function, and `TrainerState` if it reads it."""
        if self._reads_state:
            trainer_state(0)

    def __call__(self, rollouts: Rollouts) -> Any:
        if self._wanted.own_style:
            arguments: dict[str, Any] = {"rollouts": rollouts}
        else:
            state = (trainer_state if self._reads_state else LazyState)(self._rollouts)
            arguments = self._wanted.choose(trl_arguments(rollouts, self._logs, state))
        try:
            given = self._loaded(**arguments)
        except Exception as error:
            raise self._error(error) from error
        return self._awaited(given) if inspect.isawaitable(given) else given

    async def _awaited(self, given: Any) -> Any:
        try:
            return await given
        except Exception as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> RuntimeError:
        return RuntimeError(f"reward function {self._title}: {type(error).__name__}: {error}")

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """Return columns (`log_extra`) and metrics (`log_metric`) that the function logged since the last call."""
        return self._logs.take()

    def observe(self, statistics: Mapping[str, float]) -> None:
        self._rollouts += 1

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self._rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rollouts = state["rollouts"]

    @cached_property
    def _loaded(self) -> Callable[..., Any]:
        return load_function(self.function) if isinstance(self.function, str) else self.function

    @cached_property
    def _wanted(self) -> Parameters:
        return parameters(self._loaded, self._title)

    @cached_property
    def _reads_state(self) -> bool:
        return reads_state(self._loaded, self._wanted)

    @property
    def _title(self) -> str:
        if isinstance(self.function, str):
            return self.function
        return getattr(self.function, "__name__", None) or type(self.function).__name__


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Function]
