"""What a reward source is: base class of the axis `rewards`.

A source answers for each row with a number, with `Spans` (a reward for each step), with `TokenScores` (one for each
token), or with None where it does not apply. How it is run, what a failure gives, which rows it sees and what becomes of
its numbers are settings that every source has; `hf_rlhf.scoring.scorer` reads them.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from hf_rlhf.batch import Rollouts, Spans, TokenScores
from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Count, Fraction, Plugin, Positive

Answers = Sequence[float | Spans | TokenScores | None]


@dataclass(kw_only=True)
class RewardSource(Plugin, ABC):
    """Scores completions. Axis `rewards`, a list."""

    axis = Axis(section="Rewards", metric_prefix="reward/<label>", many=True)

    verifier: ClassVar[bool] = False
    """True where a score of 1 means correct: then evaluation reports accuracy, pass@k and maj@k."""
    rowwise: ClassVar[bool] = False
    """True where a row's score depends on that row alone: rows are then scored apart, so that one that hangs or raises takes
    no other with it, and spread over the workers. Where False, one call gets all rows."""

    draws: ClassVar[bool] = False
    """True where it draws from the global random generators: they are then seeded for each row of a rowwise source too."""

    weight: float = 1.0
    """Factor of this source in the total reward."""
    label: str | None = None
    """Name in logs and tables; the plugin's name by default. Two sources need two labels."""
    when: dict[str, Any] | None = None
    """Dataset column -> value, or list of values: the source applies to rows that have them all; all rows when left out."""
    clip: tuple[float, float] | None = None
    """Lowest and highest score of a row, step or token; lower and higher ones become these."""
    normalize: Literal["none", "std", "mean_std"] = "none"
    """Divide scores, after `clip`, by the running standard deviation of all rows so far, with mean_std after subtracting
    their running mean."""
    workers: Literal["inline", "threads", "processes", "ray"] = "inline"
    """Where it runs: in the main thread, in threads (waiting for a network), in processes (which can be killed), or in
    actors on a Ray cluster."""
    num_workers: Count | None = None
    """Threads, processes or actors of each process of the run; its cores when left out, 4 more of threads. Of an async
    source: rows that are awaited at a time, all when left out."""
    timeout: Positive | None = 600.0
    """Seconds for a row, or for the whole call of a source that sees all rows at once; then the call is given up."""
    retries: Annotated[int, Ge(0)] = 0
    """How often a row (or call) that failed is tried again."""
    on_error: Literal["raise", "none"] | float = "none"
    """What a row gives whose scoring failed: the end of the run, no score, or this number."""
    failure_budget: Fraction = 0.2
    """Share of rows that may fail: the run ends when more did in three calls in a row, or when all did in the first; calls
    of fewer than 8 rows are taken together."""
    memory_mib: Count | None = None
    """Address space of a worker process in MiB; without bound when left out."""

    @property
    def runs_model(self) -> bool:
        """Whether it runs a model, the policy or its own: all sources then wait for the policy's forwards."""
        return "reward_model" in self.provides

    @property
    def asynchronous(self) -> bool:
        """Whether calling it gives an awaitable."""
        return inspect.iscoroutinefunction(type(self).__call__)

    @abstractmethod
    def __call__(self, rollouts: Rollouts) -> Answers | Awaitable[Answers]:
        """Per row one number, `Spans` (by step), `TokenScores` (by token), or None (NaN) where this source does not apply.

        An async source gives an awaitable of these: all such sources are awaited together.
        """

    def columns(self) -> set[str]:
        """Dataset columns that it reads besides those of `when`."""
        return set()

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """What this source logged since the last call: columns of the completions table, one value per row, and metrics,
        whose values are averaged. They appear under `<label>/` and `reward/<label>/`."""
        return {}, {}

    def answer(self, completion: str) -> str | None:
        """The final answer in a completion, for majority votes; None where there is none. Verifiers override it."""
        return None


def nested_of(plugin: Plugin) -> Iterator[Plugin]:
    """The plugins among a plugin's settings, and those among theirs."""
    for setting in fields(plugin):
        value = getattr(plugin, setting.name)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, Plugin):
                yield child
                yield from nested_of(child)
