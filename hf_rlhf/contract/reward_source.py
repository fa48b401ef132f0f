"""Base class of the axis `rewards`.

A source returns for each row a number, `Spans` (a reward per step), `TokenScores` (a reward per token), or None if it does
not apply. Every source has settings for workers, failures, the rows it applies to and normalization, which
`hf_rlhf.scoring.scorer` reads.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from hf_rlhf.batch import Rollouts, Spans, TokenScores
from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Count, Fraction, Plugin, Positive, nested_of

Answers = Sequence[float | Spans | TokenScores | None]


@dataclass(kw_only=True)
class RewardSource(Plugin, ABC):
    """Score completions. Axis `rewards`, a list."""

    axis = Axis(section="Rewards", metric_prefix="reward/<label>", many=True, default=())

    verifier: ClassVar[bool] = False
    """True if a score of 1 means correct: evaluation then reports accuracy, pass@k and maj@k."""
    penalty: ClassVar[bool] = False
    """True if 0 is its best score, of a completion with nothing to object to."""
    rowwise: ClassVar[bool] = False
    """True if a row's score depends on that row alone: rows are then scored one by one over the workers, so that one that
    hangs or raises does not affect others. If False, one call gets all rows."""

    provided: ClassVar[frozenset[str]] = frozenset()
    """Names besides the dataset's columns that a misspelt column may mean."""

    draws: ClassVar[bool] = False
    """True if it draws from the global random generators: they are then seeded for each row of a rowwise source too."""

    recipe_path = ""
    """Dotted path in the recipe that made it, such as `rewards.0`; empty for a source made by itself."""

    weight: float = 1.0
    """Factor of this source in the total reward."""
    label: str | None = None
    """Name in logs and tables; the plugin's name by default. Two sources need two labels."""
    when: dict[str, Any] | None = None
    """Dataset column -> value or list of values: the source applies to rows that match all; by default to all rows."""
    clip: tuple[float, float] | None = None
    """Clip the score of each row, step or token to [lowest, highest]."""
    normalize: Literal["none", "std", "mean_std"] = "none"
    """After `clip`, divide scores by the running standard deviation of all rows so far; mean_std first subtracts their running
    mean."""
    workers: Literal["inline", "threads", "processes", "ray"] = "inline"
    """Runner: the main thread, threads (for network requests), processes (which can be killed), or actors on a Ray
    cluster."""
    num_workers: Count | None = None
    """Threads, processes or actors per process of the run; by default its cores, plus 4 for threads. For an async source:
    rows awaited at a time, by default all."""
    timeout: Positive | None = 600.0
    """Seconds after which a row, or the call of a source that gets all rows, is abandoned."""
    retries: Annotated[int, Ge(0)] = 0
    """Retries of a failed row or call."""
    on_error: Literal["raise", "none"] | float = "none"
    """Result of a row whose scoring failed: raise to end the run, none for no score, or a number."""
    failure_budget: Fraction = 0.2
    """Share of rows that may fail: the run ends if more fail in three consecutive calls, or all in the first; calls of fewer
    than 8 rows are counted together."""
    memory_mib: Count | None = None
    """Address space limit of a worker process in MiB; no limit by default."""
    resources: dict[str, Any] | None = None
    """With `workers=ray` what each actor asks of the cluster: num_cpus (0 by default), num_gpus, and placement (spread: over
    the nodes; or a node's address). A GPU may be shared (num_gpus: 0.25)."""

    @property
    def runs_model(self) -> bool:
        """Return whether it runs a model, the policy or its own: all sources then wait for the policy's forwards."""
        return "reward_model" in self.provides

    @property
    def asynchronous(self) -> bool:
        """Return whether calling it returns an awaitable."""
        return inspect.iscoroutinefunction(type(self).__call__)

    def prepare(self) -> None:
        """Import and load what calls need, outside their time limit. Called in each process that scores, before `setup`."""

    @abstractmethod
    def __call__(self, rollouts: Rollouts) -> Answers | Awaitable[Answers]:
        """Return per row a number, `Spans` (by step), `TokenScores` (by token), or None (NaN) if it does not apply.

        An async source returns an awaitable of these: all such sources are awaited together.
        """

    def columns(self) -> set[str]:
        """Return the dataset columns that it reads besides those of `when`."""
        return set()

    @property
    def reader(self) -> str:
        """Return who reads the columns, for errors."""
        return f"rewards.{self.name}"

    def override(self, setting: str) -> str:
        """Return `name=value` as an override of the recipe that made the source, for messages that say what to set."""
        return f"{self.recipe_path}.{setting}" if self.recipe_path else setting

    def resource_errors(self) -> Iterator[str]:
        """Yield what is wrong with `resources`."""
        name, given = self.override("resources"), self.resources or {}
        if given and self.workers != "ray":
            yield f"{name} is for actors of Ray: set {self.override('workers=ray')}, or leave it out"
        for key, value in given.items():
            if key not in ("num_cpus", "num_gpus", "placement"):
                yield f"{name} has no {key!r}; choose from num_cpus, num_gpus, placement"
            elif key == "placement" and not (isinstance(value, str) and value):
                yield f"{name}.placement must be spread or a node's address, got {value!r}"
            elif key != "placement" and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                yield f"{name}.{key} must be a number of at least 0, got {value!r}"
            elif key == "num_gpus" and value > 1 and value != int(value):
                yield f"{name}.num_gpus must be a whole number above 1, got {value!r}"

    def patterns(self) -> set[str]:
        """Return texts and regular expressions that a completion is to contain: their special tokens must not be hidden."""
        return set()

    def prompt_check(self, chat_template_kwargs: dict[str, Any]) -> Callable[[Any], object] | None:
        """Return a function that raises `ValueError` for a prompt that it cannot read; None if it reads every prompt.

        Rows are checked with it before any model is loaded. `chat_template_kwargs`: the recipe's variables of chat templates.
        """
        return None

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """Return columns of the completions table, one value per row, and metrics, whose values are averaged.

        They cover the time since the last call, and are logged under `<label>/` and `reward/<label>/`.
        """
        return {}, {}

    def answer(self, completion: str) -> str | None:
        """Return the final answer in a completion for majority votes, None if there is none. Verifiers override it."""
        return None


def prepare_all(source: RewardSource) -> None:
    """Prepare a source and the sources nested in it."""
    for each in (source, *nested_of(source)):
        if isinstance(each, RewardSource):
            each.prepare()
