"""Arguments of a user's reward function, as TRL passes them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rlhf.batch import Rollouts

logger = logging.getLogger(__name__)

PROVIDED = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""Keyword arguments that do not come from the dataset."""


@dataclass(kw_only=True)
class Parameters:
    """Parameters in a function's signature."""

    own_style: bool
    """True if its only required parameter is `rollouts`."""
    names: set[str]
    open: bool
    """True if it takes any keyword."""
    columns: set[str]
    """Parameters that only the dataset can fill."""

    def choose(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments if self.open else {name: value for name, value in arguments.items() if name in self.names}


def parameters(function: Callable[..., Any], title: str) -> Parameters:
    """Return the parameters of `function`. Raises `ValueError` if it cannot be called with keyword arguments."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward function {title}: cannot read its signature: {error}") from error
    fixed = [p.name for p in found if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if fixed:
        raise ValueError(f"reward function {title}: {', '.join(fixed)} must not be positional-only. Remove the `/`")
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = {p.name for p in named if p.default is p.empty}
    own_style = required == {"rollouts"}
    return Parameters(
        own_style=own_style,
        names={p.name for p in named},
        open=any(p.kind is p.VAR_KEYWORD for p in found),
        columns=set() if own_style else required - PROVIDED,
    )


def reads_state(function: Callable[..., Any], wanted: Parameters) -> bool:
    """Return whether a function reads `trainer_state`: by a parameter, or through `**kwargs` if its file has the name."""
    if not wanted.open:
        return "trainer_state" in wanted.names
    try:
        source = inspect.getsourcefile(inspect.unwrap(function)) or ""
        return "trainer_state" in Path(source).read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError, ValueError):
        return True


class LazyState:
    """TrainerState whose class, which takes seconds to import, is imported when more than `global_step` is read."""

    def __init__(self, step: int) -> None:
        self.global_step = step

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(trainer_state(self.global_step), name)


def trainer_state(step: int) -> Any:
    """Return Trainer's state, of which only `global_step` is set."""
    from transformers import TrainerState

    return TrainerState(global_step=step)


def trl_arguments(rollouts: Rollouts, logs: Logs, state: Any) -> dict[str, Any]:
    """Return copies of all keyword arguments that TRL would pass."""
    conversations = bool(rollouts.prompts) and not isinstance(rollouts.prompts[0], str)
    texts = rollouts.completions
    return {
        **{name: list(values) for name, values in rollouts.columns.items()},
        "prompts": list(rollouts.prompts),
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if conversations else list(texts),
        "completion_ids": [copy(ids) for ids in rollouts.completion_ids],
        "trainer_state": state,
        "log_extra": lambda column, values: logs.column(column, values, len(rollouts)),
        "log_metric": logs.metric,
    }


@dataclass
class Logs:
    """Columns and metrics that a function logs; invalid values are dropped with a warning."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def column(self, name: str, values: Any, rows: int) -> None:
        try:
            values = list(values)
        except TypeError:
            values = []
        if len(values) != rows:
            logger.warning("log_extra(%r): %d values for %d rows; dropped", name, len(values), rows)
            return
        self.columns[str(name)] = values

    def metric(self, name: str, value: Any) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            logger.warning("log_metric(%r): %r is not a number; dropped", name, value)
        else:
            self.metrics.setdefault(str(name), []).append(number)

    def take(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        taken = self.columns, self.metrics
        self.columns, self.metrics = {}, {}
        return taken
