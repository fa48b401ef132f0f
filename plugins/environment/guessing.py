"""A number is hidden, and each guess is answered by higher or lower.

Worth 1 if it is guessed in `max_turns` turns, else 0. The number is a column that the policy does not see; it is the same for
all rows of a group, so that their rewards compare the guesses alone. With n numbers, 1 + log2(n) turns, rounded down, suffice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Environment, Model, Outcome, Over, Task

_NUMBER = re.compile(r"-?\d+")


@dataclass(kw_only=True)
class Guessing(Environment):
    """The policy guesses a hidden number and is told whether it is higher or lower."""

    name = "guessing"
    words = "guesses of a hidden number"

    column: str = "secret"
    """Dataset column of the hidden number."""
    higher: str = "higher"
    """Message to the policy after a guess below it."""
    lower: str = "lower"
    """Message to the policy after a guess above it. A text without a number ends the episode."""

    def columns(self) -> set[str]:
        return {self.column}

    async def play(self, task: Task, model: Model) -> Outcome:
        messages, secret, guesses, found = list(task.messages), int(task.columns[self.column]), 0, False
        while not found:
            try:
                said = await model(messages)
            except Over:
                break
            guesses += 1
            if (number := _NUMBER.search(str(said["content"] or ""))) is None:
                break
            found = int(number[0]) == secret
            messages += [said, {"role": "user", "content": self.higher if int(number[0]) < secret else self.lower}]
        return Outcome(reward=float(found), columns={"guesses": guesses})


@hookimpl
def environment() -> list[type[Environment]]:
    return [Guessing]
