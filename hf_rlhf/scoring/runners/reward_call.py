"""A call of a reward source, in any thread, process or actor. Needs no torch."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import random
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_rlhf.batch import Rollouts
from hf_rlhf.contract.reward_source import RewardSource
from hf_rlhf.runtime.errors import root_cause
from hf_rlhf.runtime.plain_text import escaped, format_traceback
from hf_rlhf.scoring.answers import RewardError, as_json, checked, from_json

logger = logging.getLogger(__name__)

Kind = Literal["", "error", "timeout", "wrong", "cancelled"]


@dataclass(kw_only=True)
class RewardCall:
    """Input of a call."""

    rows: list[int]
    """Indices of its rows."""
    rollouts: Rollouts | None = None
    """Rows to score; a copy that the source may change."""
    texts: list[str] | None = None
    """Completions from which to extract final answers, instead of `rollouts`."""
    seed: int | None = None
    """Seed of the global random generators during the call; None leaves them unchanged."""


@dataclass(kw_only=True)
class CallResult:
    """Result of a unit: its answers, or the reason for failure."""

    answers: list[Any] = field(default_factory=list)
    """One answer per row: numbers, Spans or TokenScores, or the final answers as text or None."""
    invalid: list[int] = field(default_factory=list)
    """Rows for which it returned NaN or an infinite number."""
    kind: Kind = ""
    """Empty for success; error: it raised, or its process died; timeout; wrong: it returned an invalid
    answer; cancelled: it was not called."""
    reason: str = ""
    trace: str = ""
    error: BaseException | None = None
    """Exception, if it was raised in this process."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Convert to plain data, which is safe to deserialize."""
        plain = {name: value for name, value in vars(self).items() if name != "error"}
        return {**plain, "answers": [x if isinstance(x, str) else as_json(x) for x in self.answers]}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> CallResult:
        """Convert the output of `as_json` back."""
        return cls(**{**plain, "answers": [from_json(x) for x in plain["answers"]]})


class TimeUp(BaseException):
    """Interruption of a call; not an `Exception`, which the call might catch."""


def call(label: str, source: RewardSource, unit: RewardCall) -> CallResult:
    """Call the source and validate its answers.

    Every error becomes a result, including `SystemExit`: a reward that exits must not end the run as if it had succeeded.
    Only `KeyboardInterrupt` and `TimeUp` propagate.
    """
    try:
        if unit.seed is not None:
            reseed(unit.seed)
        if unit.texts is not None:
            return CallResult(answers=[source.answer(text) for text in unit.texts])
        assert unit.rollouts is not None
        given: Any = source(unit.rollouts)
        if inspect.isawaitable(given):
            given = finish(given)
        return answered(label, given, unit)
    except (KeyboardInterrupt, TimeUp):
        raise
    except BaseException as error:
        return failed(error)


def answered(label: str, given: Any, unit: RewardCall) -> CallResult:
    """Return the result of a call that returned `given`."""
    assert unit.rollouts is not None
    try:
        answers, invalid = checked(label, given, unit.rollouts, unit.rows)
    except RewardError as error:
        return CallResult(kind="wrong", reason=str(error))
    return CallResult(answers=answers, invalid=invalid)


def _own(frames: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """Remove wandb's frames: it replaces `sys.exit` while it logs a run."""
    return [frame for frame in frames if f"{os.sep}wandb{os.sep}" not in frame.filename]


def failed(error: BaseException) -> CallResult:
    """Return the result of a call that raised."""
    places = [_own(traceback.extract_tb(one.__traceback__)) for one in (error.__cause__, error) if one is not None]
    place = next((f" (at {found[-1].filename}:{found[-1].lineno})" for found in places if found), "")
    return CallResult(
        kind="error",
        reason=escaped(f"raised {type(error).__name__}: {error}{place}"),
        trace=format_traceback(root_cause(error)),
        error=error,
    )


def late(seconds: float, why: str = "") -> CallResult:
    """Return the result of a call that exceeded its time limit."""
    return CallResult(kind="timeout", reason=f"took over {seconds:g} s{why}")


def cancelled() -> CallResult:
    """Return the result of a call for which nobody waits any more."""
    return CallResult(kind="cancelled")


def logs_of(label: str, source: RewardSource) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
    """Return columns and metrics that the source logged since the last call; invalid ones are dropped with a warning."""
    if type(source).take_logs is RewardSource.take_logs:
        return {}, {}
    try:
        columns, metrics = source.take_logs()
        numbers = {str(name): [float(x) for x in values] for name, values in metrics.items()}
        return {str(name): list(column) for name, column in columns.items()}, numbers
    except Exception:
        logger.warning("reward %r: its logs cannot be read and are dropped", label, exc_info=True)
        return {}, {}


def logged(label: str, source: RewardSource, outcome: CallResult) -> CallResult:
    """Add the logs of the call to its result."""
    outcome.columns, outcome.metrics = logs_of(label, source)
    return outcome


def reseed(seed: int) -> None:
    """Seed Python's generator, and NumPy's and torch's if they are imported."""
    random.seed(seed)
    numbers, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numbers is not None:
        numbers.seed(seed)
    if torch is not None:  # `torch.manual_seed` probes every kind of device, which is slow
        (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(seed)


def finish(awaitable: Any) -> Any:
    """Await in a separate thread, because the caller's may already run an event loop, and return the result."""

    async def wait() -> Any:
        return await awaitable

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()
