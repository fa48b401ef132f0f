"""A wrong answer is called wrong, and may be tried again for less.

The answer of attempt k, from 0, is worth decay^k if it is right and 0 if not, at the end of its turn. Departure from a plain
retry: what the policy said stays in the conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Environment, Fraction, Model, Outcome, Over, Task, Turn


@dataclass(kw_only=True)
class SecondChance(Environment):
    """The policy answers; an answer that differs from the row's reference may be tried again, for less."""

    name = "second_chance"
    words = "up to {attempts} attempts, each further one worth {decay:g} of the one before"

    attempts: Count = 2
    """Most answers of an episode."""
    decay: Fraction = 0.5
    """Factor of the reward at each further attempt."""
    column: str = "answer"
    """Dataset column of the reference; numbers are compared as text, without whitespace around them."""
    says: str = "That is wrong. Try again: {prompt}"
    """Message to the policy after a wrong answer, with the last message of the prompt in place of {prompt}."""

    def columns(self) -> set[str]:
        return {self.column}

    async def play(self, task: Task, model: Model) -> Outcome:
        messages, turns = list(task.messages), list[Turn]()
        wrong = {"role": "user", "content": self.says.replace("{prompt}", str(task.messages[-1]["content"]))}
        for attempt in range(self.attempts):
            try:
                answer = await model(messages)
            except Over:
                break
            right = self._is_right(answer, task.columns[self.column])
            turns.append(Turn(reward=self.decay**attempt * right))
            if right:
                break
            messages += [answer, wrong]
        return Outcome(turns=turns, columns={"attempts": len(turns)})

    def _is_right(self, answer: dict[str, Any], reference: Any) -> bool:
        return str(answer["content"] or "").strip() == str(reference).strip()


@hookimpl
def environment() -> list[type[Environment]]:
    return [SecondChance]
