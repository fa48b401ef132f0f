"""A taskset of `verifiers` with a harness that runs in the process: the policy says a letter, and may say it again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpx
import verifiers.v1 as vf


class LetterData(vf.TaskData):
    letter: str


class LetterTask(vf.Task[LetterData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def right(self, trace: Any) -> float:
        """1 if the last answer has the letter."""
        return float(self.data.letter in said(trace)[-1])

    @vf.metric
    async def answers(self, trace: Any) -> float:
        """Number of answers."""
        return float(len(said(trace)))


def said(trace: Any) -> list[str]:
    return [node.message.content or "" for node in trace.nodes if node.message.role == "assistant"]


class Letters(vf.Taskset[LetterTask, vf.TasksetConfig]):
    def load(self) -> Iterable[LetterTask]:
        for letter in "xyz":
            yield LetterTask(LetterData(prompt=f"say {letter}", letter=letter), self.config.task)


class Twice(vf.Harness[vf.HarnessConfig]):
    """Asks, and asks once more."""

    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, **_) -> Any:
        messages = [{"role": "user", "content": data.prompt}]
        async with httpx.AsyncClient(timeout=60, headers={"Authorization": f"Bearer {secret}"}) as client:
            for _ in range(2):
                reply = await client.post(
                    f"{endpoint}/chat/completions", json={"model": ctx.model, "messages": messages}
                )
                if reply.is_error:
                    return vf.ProgramResult(exit_code=1, stdout="", stderr=reply.text)
                answer = reply.json()["choices"][0]["message"]
                messages += [answer, {"role": "user", "content": "again"}]
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["Letters", "Twice"]
