"""Environments that play in worker processes. Imports no torch, which would cost each of them seconds."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rlhf.axes import Environment, Outcome, Over, Task, Turn


@dataclass(kw_only=True)
class Talk(Environment):
    """Two turns; what a row's column `does` says happens between them."""

    name = "talk"

    def columns(self) -> set[str]:
        return {"does"}

    def play(self, task: Task, model: Any) -> Any:
        first = model(task.messages)
        self.act(task.columns["does"])
        more = [*task.messages, first, {"role": "user", "content": f"cd{task.seed % 7}"}]
        second = model(more, max_tokens=2)
        turns = [Turn(reward=0.5), Turn(reward=float(second["turn"]), state="end")]
        return Outcome(turns=turns, columns={"pid": os.getpid(), "reason": second["finish_reason"]})

    def act(self, does: str) -> None:
        if does == "raise":
            raise KeyError("port")
        if does == "exit":
            raise SystemExit(3)
        if does == "die":
            os._exit(3)
        if does == "spin":
            while True:
                pass
        if does == "child":
            Path(f"/tmp/{os.getppid()}.pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
            time.sleep(600)


@dataclass(kw_only=True)
class Awaited(Talk):
    name = "awaited"

    async def play(self, task: Task, model: Any) -> Any:
        first = await model(task.messages)
        await asyncio.to_thread(self.act, task.columns["does"])
        more = [*task.messages, first, {"role": "user", "content": f"cd{task.seed % 7}"}]
        second = await model(more, max_tokens=2)
        turns = [Turn(reward=0.5), Turn(reward=float(second["turn"]), state="end")]
        return Outcome(turns=turns, columns={"pid": os.getpid(), "reason": second["finish_reason"]})


class Post(Talk):
    """An agent that talks to the URL."""

    name = "post"

    def play(self, task: Task, model: Any) -> float:
        for _ in range(int(task.columns["does"])):
            body = json.dumps({"messages": task.messages}).encode()
            request = urllib.request.Request(f"{model.url}/chat/completions", body)
            said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
        return float(said == "hi")


class Endless(Talk):
    name = "endless"

    def play(self, task: Task, model: Any) -> float:
        messages = list(task.messages)
        while True:
            messages += [model(messages), {"role": "user", "content": "c"}]


class Patient(Talk):
    """Catches Over, in every turn after it as well."""

    name = "patient"

    def play(self, task: Task, model: Any) -> float:
        said = model(task.messages)
        caught = 0
        for _ in range(2):
            try:
                model([*task.messages, said, {"role": "user", "content": "c"}])
            except Over:
                caught += 1
        return caught / 8


class Odd(Talk):
    name = "odd"

    def play(self, task: Task, model: Any) -> Any:
        model(task.messages)
        return "well"


class Keeps(Talk):
    """Says how it was set up."""

    name = "keeps"
    up = 0

    def setup(self, context: Any) -> None:
        self.up += 1

    def play(self, task: Task, model: Any) -> float:
        model(task.messages)
        return float(self.up)
