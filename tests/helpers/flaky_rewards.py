"""Reward sources that fail in every way, in a module that a worker process can import."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Context, Rollouts, Spans, TokenScores


@dataclass(kw_only=True)
class ByWord(RewardSource):
    """The length of a completion, unless its first word says what to do instead."""

    name: ClassVar[str] = "by_word"
    rowwise: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    extra: float = 0.0
    """Added to each score."""

    def __call__(self, rollouts: Rollouts) -> list[Any]:
        return [self.one(text, rollouts, row) for row, text in enumerate(rollouts.completions)]

    def one(self, text: str, rollouts: Rollouts, row: int) -> Any:
        word = text.split(" ")[0]
        if word == "sleep":
            time.sleep(3600)
        if word == "assigned":
            import ray

            return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0))
        if word == "block":
            time.sleep(2)
        if word == "spin":
            while True:
                pass
        if word == "power":
            return float(len(str(9**9**8)))
        if word == "raise":
            raise ValueError(f"cannot score {text!r}")
        if word == "caused":
            raise ValueError("bad") from KeyError("k")
        if word == "cancel":
            raise asyncio.CancelledError
        if word == "expire":
            raise TimeoutError("of its own")
        if word == "alarm":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(0)
            return 0.0
        if word == "exit":
            sys.exit(0)
        if word == "die":
            os._exit(139)
        if word == "eat":
            return float(len(bytearray(20 << 30)))
        if word == "take":
            return float(len(bytearray(int(text.split(" ")[1]) << 20)) > 0)
        if word == "child":
            subprocess.Popen(["sleep", "3601"])
            time.sleep(3600)
        if word == "once":
            return once(text.split(" ")[1])
        if word == "draw":
            return random.random()
        if word == "none":
            return None
        if word == "nan":
            return math.nan
        if word == "steps":
            return Spans([(2, 0.5), (len(text), -1.0)])
        if word == "tokens":
            return TokenScores([float(i) for i in range(len(rollouts.completion_ids[row]))])
        if word == "word":
            return "a word"
        if word == "print":
            print("printed")
            sys.stdout.flush()
        return len(text) + self.extra

    def answer(self, completion: str) -> str | None:
        return completion.split(" ")[-1] if completion else None


def once(file: str) -> float:
    """Fails unless the file is there, and makes it."""
    if os.path.exists(file):
        return 7.0
    open(file, "w").close()
    raise RuntimeError("not the first time")


@dataclass(kw_only=True)
class Whole(ByWord):
    """The same, for all rows in one call."""

    name: ClassVar[str] = "whole"
    rowwise: ClassVar[bool] = False


@dataclass(kw_only=True)
class Asynchronous(ByWord):
    """The same, awaited."""

    name: ClassVar[str] = "asynchronous"

    async def __call__(self, rollouts: Rollouts) -> list[Any]:  # type: ignore[override]
        await asyncio.sleep(0.05)
        if rollouts.completions[0].startswith("sleep"):
            await asyncio.sleep(3600)
        return [self.one(text, rollouts, row) for row, text in enumerate(rollouts.completions)]


@dataclass(kw_only=True)
class Counting(RewardSource):
    """What `observe` was told, and a column and a metric on the side."""

    name: ClassVar[str] = "counting"
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.seen, self.set_up = 0, False
        self._logs: tuple[dict[str, list[Any]], dict[str, list[float]]] = ({}, {})

    def setup(self, context: Context) -> None:
        self.set_up = True

    def __call__(self, rollouts: Rollouts) -> list[float]:
        self._logs = ({"heads": [text[:3] for text in rollouts.completions]}, {"size": [float(len(rollouts))]})
        return [float(self.seen + 100 * self.set_up)] * len(rollouts)

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        logs, self._logs = self._logs, ({}, {})
        return logs

    def observe(self, statistics: Any) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@dataclass(kw_only=True)
class Unmakeable(ByWord):
    """Cannot be unpickled where it is to run."""

    name: ClassVar[str] = "unmakeable"

    def __setstate__(self, state: Any) -> None:
        raise ImportError("not here")


@dataclass(kw_only=True)
class Stateful(RewardSource):
    """The sum of what it has seen."""

    name: ClassVar[str] = "stateful"

    def __post_init__(self) -> None:
        self.seen: Any = []

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [float(sum(self.seen))] * len(rollouts)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@dataclass(kw_only=True)
class Logging(ByWord):
    """Logs a number of NumPy for each call."""

    name: ClassVar[str] = "logging"

    def __post_init__(self) -> None:
        self.calls = 0

    def __call__(self, rollouts: Rollouts) -> list[Any]:
        self.calls += 1
        return super().__call__(rollouts)

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        import numpy

        calls, self.calls = self.calls, 0
        return {}, {"size": [numpy.float32(0.5)] * calls}


@dataclass(kw_only=True)
class Outer(RewardSource):
    """What the source within it gives."""

    name: ClassVar[str] = "outer"

    inner: RewardSource
    """The source that is asked."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return self.inner(rollouts)


def score(sources: Any, rollouts: Rollouts) -> dict[str, Any]:
    """label -> (n,) the total of each row by sources that are set up already; a failure is an error."""
    from hf_rlhf.scoring.scorer import Scorer, totals

    for _, source in sources:
        source.on_error = "raise"
    return totals({label: found.answers for label, found in Scorer(sources).ask(rollouts).items()}, rollouts)


@dataclass(kw_only=True)
class Waits(RewardSource):
    """Waits as long as each text says, and answers with its length."""

    name: ClassVar[str] = "waits"

    def __call__(self, rollouts: Rollouts) -> list[float]:
        time.sleep(max(float(text.split()[0]) for text in rollouts.completions))
        return [float(len(text)) for text in rollouts.completions]
