"""Play sessions of an OpenEnv server: the policy's answer is an action, the observation is what it reads next."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Environment, Outcome, Over, Task, Turn

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class OpenEnv(Environment):
    """A session on the server for each episode. A turn is a step: its reward stands at the end of the turn."""

    name = "openenv"
    words = "sessions at {url}"

    url: str
    """Base URL of the server, which must allow as many sessions as episodes play at a time (`max_live`)."""
    action: str
    """Field of the action that gets the policy's text."""
    observation: str | None = None
    """Field of the observation that the policy reads; None: all of it, as JSON."""

    def play(self, task: Task, model: Any) -> Outcome:
        """Play in a thread, or with `workers: processes` in a process, as the server may be slow."""
        from openenv.core import GenericEnvClient

        turns, messages = list[Turn](), list(task.messages)
        with GenericEnvClient(base_url=self.url).sync() as session:
            result = session.reset(seed=task.seed % 2**31)
            *before, last = messages
            messages = [*before, {**last, "content": f"{last['content']}{self._text(result.observation)}"}]
            while not result.done:
                try:
                    answer = model(messages)
                except Over:
                    break
                result = session.step({self.action: answer["content"] or ""})
                turns.append(Turn(reward=float(result.reward or 0.0)))
                messages += [answer, {"role": "user", "content": self._text(result.observation)}]
        return Outcome(turns=turns, columns={"done": bool(result.done)})

    def _text(self, observation: dict[str, Any]) -> str:
        return json.dumps(observation) if self.observation is None else str(observation[self.observation])


@hookimpl
def environment() -> list[type[Environment]]:
    return [OpenEnv]
