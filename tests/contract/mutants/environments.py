"""Environments that are wrong; see `base`."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.utils import get_json_schema

from hf_rlhf.axes import Context, Environment, Model, Outcome, Over, Task, Turn
from tests.contract.mutants.base import Mutant


@dataclass(kw_only=True)
class Guess(Environment):
    """Right: the policy guesses a digit, and is told whether it is too high."""

    name = "guess"

    async def play(self, task: Task, model: Model) -> Any:
        hidden, messages, turns = random.Random(task.seed).randrange(9), list(task.messages), list[Turn]()
        for _ in range(3):
            try:
                said = await model(messages)
            except Over:
                break
            right = said["content"] == str(hidden)
            turns.append(Turn(reward=float(right)))
            if right:
                break
            messages += [said, {"role": "user", "content": f"not {hidden % 2}"}]
        return Outcome(turns=turns)


class Global(Guess):
    """Draws from Python's generator."""

    async def play(self, task: Task, model: Model) -> Any:
        await model(task.messages)
        return random.random()


class Shared(Guess):
    """Counts the episodes that play."""

    played = 0

    async def play(self, task: Task, model: Model) -> Any:
        self.played += 1
        await model(task.messages)
        return float(self.played)


class Impatient(Guess):
    """Has no answer where the policy has none left."""

    async def play(self, task: Task, model: Model) -> Any:
        messages = list(task.messages)
        for _ in range(2):
            try:
                messages += [await model(messages), {"role": "user", "content": "and?"}]
            except Over as error:
                raise RuntimeError("no answer") from error
        return 1.0


class Wordy(Guess):
    """Returns what was said."""

    async def play(self, task: Task, model: Model) -> Any:
        return (await model(task.messages))["content"] + "?"


class Litter(Guess):
    """Starts a program for each episode, and leaves it."""

    async def play(self, task: Task, model: Model) -> Any:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(5)"])
        await model(task.messages)
        return 1.0


class Careless(Guess):
    """Starts a program in setup, and does not stop it in close."""

    def setup(self, context: Context) -> None:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(5)"])


class Sampler(Guess):
    """Samples from the policy by itself."""

    policy = None

    def setup(self, context: Context) -> None:
        self.policy = context.policy

    async def play(self, task: Task, model: Model) -> Any:
        if self.policy is not None:
            self.policy(torch.tensor([[1, 2]]))
        await model(task.messages)
        return 1.0


class Opaque(Guess):
    """Puts an object into a column."""

    async def play(self, task: Task, model: Model) -> Any:
        await model(task.messages)
        return Outcome(reward=1.0, columns={"board": Board()})


class Board:
    """Whose text does not change."""

    def __repr__(self) -> str:
        return "board"


class Stubborn(Guess):
    """Asks on when the policy has nothing left."""

    async def play(self, task: Task, model: Model) -> Any:
        messages = list(task.messages)
        for _ in range(3):
            try:
                messages += [await model(messages), {"role": "user", "content": "and?"}]
            except Over:
                await asyncio.sleep(60)
        return 1.0


class Fragile(Guess):
    """Raises where the policy calls its tool wrongly."""

    followers = ("tool",)

    def tool_schemas(self) -> list[dict[str, Any]]:
        return [get_json_schema(double)]

    async def play(self, task: Task, model: Model) -> Any:
        said = await model(task.messages, tools=self.tool_schemas())
        for call in said.get("tool_calls") or ():
            double(**call["function"]["arguments"])
        return 1.0


def double(x: int) -> int:
    """Double.

    Args:
        x: A number.
    """
    return 2 * x


OTHERS = ("equal seeds", "beside", "no turn", "no token", "no process", "samples", "columns")
MUTANTS = [
    Mutant(Global, "equal seeds", "from task.seed alone", ("beside",)),
    Mutant(Shared, "beside", "in local variables of play"),
    Mutant(Impatient, "no turn", "Let Over pass", ("no token",)),
    Mutant(Wordy, "ends", "play must return an Outcome", OTHERS),
    Mutant(Litter, "no process", "stop them in close"),
    Mutant(Careless, "no process", "after close, which must stop"),
    Mutant(Sampler, "samples", "Ask the model that play gets"),
    Mutant(Opaque, "columns", "column episode/board must hold plain data"),
    Mutant(partial(Stubborn, timeout=0.3), "no turn", "Let Over pass", ("no token",)),
    Mutant(Fragile, "tool", "Give the policy the error to read"),
]
