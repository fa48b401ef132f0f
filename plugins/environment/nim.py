"""The game of Nim: two agents take counters from a heap in turn, and who takes the last one wins.

The policy plays both agents, each in a conversation of its own that shows the heap as it is left to it: self-play. With
`opponent: perfect` the second agent is a perfect player, who takes one counter where no move wins: a measure of the first.
A win is worth 1, a loss 0, and an answer that is no move loses. Heaps that are a multiple of `most` + 1 are lost for who moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Environment, Model, Outcome, Task


@dataclass(kw_only=True)
class Nim(Environment):
    """The policy plays Nim against itself, or against a perfect player."""

    name = "nim"
    agents = ("first", "second")

    column: str = "heap"
    """Dataset column of the number of counters; the prompt shows it to the first agent."""
    most: Count = 3
    """Most counters that a move takes."""
    opponent: Literal["policy", "perfect"] = "policy"
    """Who plays the second agent."""
    says: str = "{heap}:"
    """Message that shows the heap before each later move."""

    def in_words(self) -> str:
        return f"games of Nim against {'itself' if self.opponent == 'policy' else 'a perfect player'}"

    def columns(self) -> set[str]:
        return {self.column}

    async def play(self, task: Task, model: Model) -> Outcome:
        heap, moves = int(task.columns[self.column]), 0
        talks: dict[str, list[dict[str, Any]]] = {"first": list(task.messages), "second": []}
        while heap > 0:
            agent, other = self.agents[:: 1 if moves % 2 == 0 else -1]
            if agent == "second" and self.opponent == "perfect":
                taken = heap % (self.most + 1) or 1
            else:
                if moves:
                    talks[agent].append({"role": "user", "content": self.says.replace("{heap}", str(heap))})
                said = await model(talks[agent], agent=agent)
                talks[agent].append(said)
                taken = self._move(said, heap)
            moves += 1
            if taken == 0:
                agent = other
                break
            heap -= taken
        return Outcome(reward={name: float(name == agent) for name in self.agents}, columns={"moves": moves})

    def _move(self, said: dict[str, Any], heap: int) -> int:
        """Return the counters that an answer takes; 0 for one that is no move."""
        text = str(said["content"] or "").strip()
        taken = int(text) if text.isdecimal() else 0
        return taken if taken <= min(self.most, heap) else 0


@hookimpl
def environment() -> list[type[Environment]]:
    return [Nim]
