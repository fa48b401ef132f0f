"""Environments and an engine for tests of episodes, without a trainer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import signal
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_rlhf.axes import AdvantageEstimator, Environment, Model, Outcome, RolloutEngine, Task
from hf_rlhf.batch import Completions, Context, Prompt, Scored
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.environments.rollout import Played, Players
from hf_rlhf.training.environments.workers import close_here, set_up_here
from tests.helpers.episodes import rendering, user
from tests.helpers.runs import recipe
from tests.helpers.waits import until

Play = Callable[[Task, Model], Awaitable[Any]]


@dataclass(kw_only=True)
class Played1(Environment):
    """Plays by an async function."""

    name = "played"

    function: Play

    async def play(self, task: Task, model: Model) -> Any:
        return await self.function(task, model)


@dataclass(kw_only=True)
class Plain(Environment):
    """Plays by a plain function, in a thread."""

    name = "plain"

    function: Callable[[Task, Any], Any]

    def play(self, task: Task, model: Any) -> Any:
        return self.function(task, model)


@dataclass(kw_only=True)
class ReadsTurns(AdvantageEstimator):
    """Keeps what it was given."""

    name = "reads_turns"
    needs = frozenset({"turns", "states"})

    seen: list[Any] = field(default_factory=list)

    def __call__(self, scored: Scored) -> torch.Tensor:
        self.seen.append(scored)
        return scored.mask


class Doubling:
    """An environment as TRL documents them."""

    def reset(self, **row: Any) -> None:
        return None

    def double(self, x: int) -> int:
        """Double.

        Args:
            x: A number.
        """
        return 2 * x


@dataclass(kw_only=True)
class Says(RolloutEngine):
    """Says the same text at every call, or what `texts` has for the call's number, and notes what it was asked."""

    name = "says"

    max_new_tokens: int = 32
    texts: tuple[str, ...] = ("hi",)
    calls: list[tuple[list[str], int]] = field(default_factory=list)

    def __call__(
        self, policy: Any, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        text = self.texts[min(len(self.calls), len(self.texts) - 1)]
        self.calls.append(([policy.tokenizer.decode(prompt.ids) for prompt in prompts], num_generations))
        end = policy.tokenizer.eos_token_id
        ids = [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], end]
        rows = len(prompts) * num_generations
        logps = [[-float(i + 1) for i in range(len(ids))] for _ in range(rows)]
        return Completions(
            ids=[list(ids) for _ in range(rows)], finish_reasons=["stop"] * rows, logps=logps, exact=True
        )


ALPHABET = "0123456789 aA"


@dataclass(kw_only=True)
class Hashed(RolloutEngine):
    """Says what depends on the tokens before it, and in the first turn on the number of the generation."""

    name = "hashed"

    def __call__(
        self, policy: Any, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        ids = []
        for prompt in prompts:
            for k in range(num_generations):
                seed = zlib.crc32(repr((prompt.ids, k)).encode())
                text = "".join(ALPHABET[(seed >> 4 * i) % len(ALPHABET)] for i in range(1 + seed % 5))
                ids.append(
                    [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id]
                )
        return Completions(ids=ids, finish_reasons=["stop"] * len(ids))


@dataclass(kw_only=True)
class Forking(Environment):
    """Forks of three kinds: another conversation, the way back, and a second answer to the same question.

    The variable KILLED_AT_TURN ends the process like `kill -9` before so many turns of it, once the file KILLED_AFTER is there.
    """

    name = "forking"

    max_tokens: int = 64

    async def play(self, task: Task, model: Model) -> float:
        async def ask(messages: list[dict[str, Any]]) -> dict[str, Any]:
            if next(TURNS) == int(os.environ.get("KILLED_AT_TURN", "-1")):
                until(Path(os.environ["KILLED_AFTER"]).exists, 60)
                os.kill(os.getpid(), signal.SIGKILL)
            return await model(messages)

        first = await ask(task.messages)
        await ask([user("zz " + first["content"])])
        second = await ask([*task.messages, first, user("cd")])
        last = await ask([*task.messages, first, user("cd")])
        return float(len(str(second["content"])) + len(str(last["content"])))


TURNS = itertools.count()


@dataclass(kw_only=True)
class Duel(Environment):
    """Two agents, of which the second reads what the first said; some episodes have a third turn."""

    name = "duel"
    agents = ("first", "second")

    max_tokens: int = 64

    async def play(self, task: Task, model: Model) -> Outcome:
        one = await model(task.messages, agent="first")
        other = await model([user(f"he says {one['content']}")], agent="second")
        if len(str(other["content"])) > 1:
            await model([*task.messages, one, user("or " + str(other["content"]))], agent="first")
        wins = str(one["content"]) < str(other["content"])
        return Outcome(reward={"first": float(wins), "second": float(not wins)})


@dataclass(kw_only=True)
class AtOnce(Environment):
    """Two agents answer at the same time, then each hears what the other said."""

    name = "at_once"
    agents = ("first", "second")

    max_tokens: int = 64

    async def play(self, task: Task, model: Model) -> Outcome:
        async def speak(agent: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
            await asyncio.sleep(0)
            return [*messages, await model(messages, agent=agent)]

        one, other = await asyncio.gather(speak("first", task.messages), speak("second", [user("z")]))
        heard = [*one, user(other[-1]["content"])], [*other, user(one[-1]["content"])]
        async with asyncio.TaskGroup() as group:
            for agent, messages in zip(self.agents, heard, strict=True):
                group.create_task(speak(agent, messages))
        return Outcome(reward={"first": 1.0, "second": 0.0})


@dataclass(kw_only=True)
class Served(Hashed):
    """Says what depends on the tokens before it alone, each question at its own time."""

    name = "served"
    deterministic = False

    fails: bool = False

    def __call__(self, policy: Any, prompts: Sequence[Prompt], *args: Any, **options: Any) -> Completions:
        raise AssertionError("it serves requests one by one")

    async def sample(self, policy: Any, row: int, prompt: Prompt, *, temperature: float | None = None) -> Completions:
        await asyncio.sleep(len(prompt.ids) % 3 / 500)
        if self.fails:
            raise ConnectionError("the server is gone")
        return super().__call__(policy, [prompt], 1)


def policy() -> Policy:
    """The tiny policy as engines get it."""
    model, tokenizer = tiny_policy()
    return Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu"), wants_logps=True)


def play(
    environments: Environment | list[Environment],
    engine: RolloutEngine | None = None,
    prompts: Sequence[str | list[dict[str, Any]]] = ("ab",),
    group: int = 1,
    columns: dict[str, Any] | None = None,
    advantages: AdvantageEstimator | str = "group_norm",
    place: tuple[int | str, ...] = (0, "rollout", 0, 0),
    tokenizer: Any = None,
) -> Played:
    """Episodes of environments: `group` of each prompt, a text or, with a chat template, messages."""
    own = policy()
    own.tokenizer = tokenizer or own.tokenizer
    texts = [x if isinstance(x, str) else rendering(own.tokenizer, x, None) for x in prompts]
    given = [
        Prompt(
            ids=own.tokenizer(text, add_special_tokens=False)["input_ids"],
            prompt=prompt,
            columns={name: values[i] for name, values in (columns or {}).items()},
        )
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    chosen = environments if isinstance(environments, list) else [environments]
    algorithm = dataclasses.replace(
        recipe(rollout=engine or Says(), advantages=advantages).algorithm(), environment=chosen
    )
    players = Players(algorithm=algorithm, policy=own, autocast=contextlib.nullcontext)
    return players(given, list(range(len(given))), group, None, place, (0,))


@contextlib.contextmanager
def opened(environment: Environment) -> Iterator[Environment]:
    """An environment that is set up, and closed after the block."""
    set_up_here(environment, Context(device=torch.device("cpu"), policy=None, tokenizer=None))
    try:
        yield environment
    finally:
        close_here(environment)
