"""One turn and no words of its own: GRPO through it is bit-identical to single-turn GRPO."""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Environment, Model, Task


@dataclass(kw_only=True)
class Echo(Environment):
    """Asks the policy once; other reward sources score what it said."""

    name = "echo"
    followers = ()
    words = "one turn"

    async def play(self, task: Task, model: Model) -> None:
        await model(task.messages)


@hookimpl
def environment() -> list[type[Environment]]:
    return [Echo]
