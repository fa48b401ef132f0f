"""Tell the policy that its answer is wrong, and let it try once more.

Try it: `hf-rlhf train quickstart 'environment={use: once_more, max_tokens: 24}' 'rewards=[episode]'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Environment, Fraction, Model, Outcome, Task, Turn

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class OnceMore(Environment):
    """The row's `answer` is worth 1, and less at the second attempt."""

    name = "once_more"

    second: Fraction = 0.5
    """Reward of an answer that is right at the second attempt."""

    def columns(self) -> set[str]:
        return {"answer"}

    async def play(self, task: Task, model: Model) -> Outcome:
        messages = task.messages
        answer = await model(messages)
        if answer["content"].strip() == task.columns["answer"]:
            return Outcome(turns=[Turn(reward=1.0)])
        messages = [*messages, answer, {"role": "user", "content": f"no {task.messages[0]['content']}"}]
        answer = await model(messages)
        right = answer["content"].strip() == task.columns["answer"]
        return Outcome(turns=[Turn(), Turn(reward=self.second * right)])


@hookimpl
def environment() -> list[type[Environment]]:
    return [OnceMore]
