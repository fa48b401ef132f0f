"""Environments that are wrong; see `base`."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from hf_rlhf.axes import Environment, Model, Outcome, Over, Task, Turn
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


OTHERS = ("equal seeds", "beside", "no turn", "no token", "no process")
MUTANTS = [
    Mutant(Global, "equal seeds", "from task.seed alone", ("beside",)),
    Mutant(Shared, "beside", "in local variables of play"),
    Mutant(Impatient, "no turn", "Let Over pass", ("no token",)),
    Mutant(Wordy, "ends", "play must return an Outcome", OTHERS),
    Mutant(Litter, "no process", "stop them in close"),
]
