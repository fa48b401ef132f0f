"""Base class of the axis `environment`: episodes in which the policy speaks more than once.

The environment plays, and the policy is a function that it calls with the conversation so far. The core keeps the tokens: what
the policy sampled is never made again from text, and what the environment says has mask 0.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, cast

from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Count, Plugin, Positive

POLICY = "policy"
"""The agent of an environment that names none."""
AGENT = "episode/agent"
"""Column of the agent's name: of rows, and of what the engine is asked where an environment has several agents."""
Message = dict[str, Any]
"""A chat message: role, content and whatever else the chat template reads."""


class Over(Exception):
    """Raised by the policy's function where an episode has no turns or tokens left, or was given up."""


class Model(Protocol):
    """The policy, as an environment calls it. A plain `def play` calls it without `await`."""

    @property
    def url(self) -> str:
        """Base URL of a server on this machine that speaks OpenAI's chat protocol, for an agent with a loop of its own.

        It belongs to this episode. A request is a turn, or `n` of them; `max_tokens`, `stop` and `tools` are honoured, other
        sampling arguments are overridden by the recipe's and counted. Requests of one episode are answered one after the other.
        When turns or tokens are used up, a request gets status 400, code context_length_exceeded; the error that the agent then
        raises ends the episode as `Over` does.
        """

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        agent: str = "policy",
        train: bool = True,
    ) -> Awaitable[Message]:
        """Return the policy's answer to a conversation: a message with `finish_reason` and `turn`, its number from 0.

        Each `agent` has conversations of its own, and is one row of the episode. A conversation that is not one so far with
        messages added is a fork: its tokens train in the same row, in their own context. `max_tokens` can only lower the bounds
        of the recipe; a text in `stop` ends the turn and is kept. With `train=False` the answer has mask 0. Several questions may
        be asked at a time, as with `asyncio.gather`. Raises `Over` where turns or tokens are used up.
        """


@dataclass
class Task:
    """Start of an episode: a row of the dataset, and a seed."""

    messages: list[Message]
    """The prompt; a text is one message of the user."""
    columns: dict[str, Any]
    """The row's other columns."""
    seed: int
    """Depends on the run's seed, the rollout, the attempt, the group and the row in it, and on nothing else."""


@dataclass
class Turn:
    """Reward and state of one turn of the policy."""

    reward: float = 0.0
    state: str | None = None
    """Name of the state in which the turn began: estimators that compare turns take equal names of a prompt as the same state.
    None: the conversation that the policy was asked with."""


@dataclass
class Outcome:
    """Result of an episode: rewards and further values."""

    reward: float | dict[str, float] | None = None
    """One number for every agent of the episode, or one for each agent by name; None, or an agent left out: no score."""
    turns: list[Turn] | None = None
    """One for each turn of the policy, those of all agents in the order of their numbers, in place of `reward`."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further values, which rewards read as `episode/<name>`."""


@dataclass(kw_only=True)
class Environment(Plugin, ABC):
    """Play episodes with the policy. Axis `environment`, a list. A row that none takes is answered once."""

    axis = Axis(section="Environment", metric_prefix="environment/<label>", many=True, default=())
    provides: ClassVar[frozenset[str]] = frozenset({"turns", "states"})

    followers: ClassVar[tuple[Literal["user", "tool"], ...]] = ("user",)
    """Roles of its messages after a turn of the policy: what the chat template writes before them must stay the same."""
    agents: ClassVar[tuple[str, ...]] = (POLICY,)
    """Names of the agents that the policy plays. Each is a row of the episode, unless it takes no turn that trains."""

    when: dict[str, Any] | None = None
    """Dataset column -> value or list of values: the environment takes rows that match all; by default all rows. Of several
    environments the first that takes a row plays it."""
    max_turns: Count = 8
    """Most turns of the policy in an episode, those of all agents."""
    max_tokens: Count = 4096
    """Most tokens of a conversation after its agent's prompt, those of the environment included; `rollout.max_new_tokens` bounds
    a turn."""
    history: Literal["extend", "as_rendered"] = "extend"
    """Earlier turns in the context of a later one: their tokens as sampled (extend), or what the chat template writes for them
    (as_rendered). Where that differs, as where it drops reasoning, the turn is a fork, which costs a second prefill."""
    max_live: Count | None = None
    """Most episodes of a process at a time; None: all of a rollout."""
    workers: Literal["inline", "processes"] = "inline"
    """Run `play` in this process, a plain one in a thread and an async one on an event loop; or in processes, of which
    one that takes longer than `timeout` is killed with its children. A thread that hangs can only be abandoned."""
    num_workers: Count = 8
    """Most processes, each of which plays one episode at a time."""
    timeout: Positive = 60.0
    """Seconds that the environment may take between two turns. Then the episode is given up."""
    on_error: Literal["raise", "none"] | float = "none"
    """Result of an episode whose environment raised or took too long: raise to end the run, none for no score, or a reward."""

    worker_pool = cast("Any", None)
    """Processes in which it plays, while they run. Set by the host."""

    @property
    def asynchronous(self) -> bool:
        """Return whether `play` is awaited."""
        return _is_async(type(self).play)

    @property
    def plays_in_processes(self) -> bool:
        """Return whether `play` runs in processes."""
        return self.workers == "processes"

    @property
    def most_live(self) -> int | None:
        """Return the most episodes of a process of the run at a time."""
        if not self.plays_in_processes:
            return self.max_live
        return min(self.num_workers, self.max_live or self.num_workers)

    @abstractmethod
    def play(self, task: Task, model: Model) -> Any:
        """Play one episode: `async def play`, which awaits `model`, or a plain `def play`, which calls it.

        Returns an `Outcome`, a reward, or None for no score. Episodes run at the same time: what belongs to one is a local
        variable. Random numbers come from `task.seed`. An `Over` that is not caught ends the episode without a score.
        """

    @property
    def reader(self) -> str:
        """Return who reads the columns, for errors."""
        return f"environment.{self.name}"

    def columns(self) -> set[str]:
        """Return the dataset columns that it reads besides those of `when`."""
        return set()

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools that it offers, which the chat template must be able to show."""
        return []


@cache
def _is_async(play: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(play)


def agents_of(environments: Iterable[Environment]) -> list[str]:
    """Return the names of all agents, by number."""
    return list(dict.fromkeys([*(name for environment in environments for name in environment.agents), POLICY]))
