"""Reward sources to numbers: each is called where its settings say, its answers are checked, failures counted, and what
does not apply is kept apart from 0."""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Context, Rollouts, Spans, TokenScores
from hf_rlhf.runtime.seeding import seed_of
from hf_rlhf.scoring.answers import Answer, RewardError
from hf_rlhf.scoring.runners import CallResult, RewardCall, Runner, runner_for
from hf_rlhf.scoring.runners.reward_call import logs_of

logger = logging.getLogger(__name__)

PATIENCE = 3
"""Calls in a row that may fail beyond a source's `failure_budget`."""
ENOUGH = 8
"""Rows by which a source is judged; calls with fewer are taken together."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A row whose scoring failed."""

    row: int
    kind: str
    """error or timeout."""
    reason: str
    trace: str
    error: BaseException | None = None
    """What was raised, where it was raised in this process."""


@dataclass(kw_only=True)
class SourceResult:
    """What came of one source."""

    answers: list[Answer]
    """One per row; NaN where the source does not apply, or failed and `on_error` is none."""
    failures: list[Failure] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """What it logged for the table of completions, one value per row."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, kind: str) -> int:
        """Failures of a kind."""
        return sum(failure.kind == kind for failure in self.failures)


class Scorer:
    """Reward sources with the workers that they run in.

    `context` is for the sources' `setup`; without one they were set up before, or need none. Sources that do not run in the
    caller's thread run beside each other and beside those that do. `close` ends workers and sources.
    """

    def __init__(self, sources: Sequence[tuple[str, RewardSource]], context: Context | None = None) -> None:
        self.sources = dict(sources)
        if len(self.sources) < len(sources):
            raise ValueError("two reward sources have one label: give each a `label` of its own")
        self._runners: dict[str, Runner] = {}
        self._budgets: dict[str, _Budget] = {label: _Budget() for label in self.sources}
        self._ends = ExitStack()
        try:
            for label, source in sources:
                if source.workers not in ("processes", "ray"):
                    self._ends.callback(source.close)
                self._runners[label] = runner = runner_for(label, source, context)
                self._ends.callback(runner.close)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every worker and closes every source that was set up here, also where one of them raises."""
        self._ends.close()

    def ask(self, rollouts: Rollouts, *seed: int | str, counts: bool = True) -> dict[str, SourceResult]:
        """label -> what each source said of the rows. `seed` is mixed with the label and the row for whoever draws random
        numbers; the global generators are the caller's to save. `counts`: failures count towards the budget.

        Each source gets copies of its own, so that none can change what the next one sees. Raises `RewardError` where a
        source gave what is no answer, failed and `on_error` is raise, or fails beyond its budget.
        """
        inline = [label for label, runner in self._runners.items() if runner.inline]
        apart = {label: _in_thread(self._ask, label, rollouts, seed) for label in self._runners if label not in inline}
        try:
            asked = {label: self._ask(label, rollouts, seed) for label in inline}
        except Exception:
            for future in apart.values():
                future.exception()  # nothing is left running
            raise
        asked |= {label: future.result() for label, future in apart.items()}
        for label in self.sources:
            self._budgets[label].judge(label, self.sources[label], asked[label], counts)
        return {label: asked[label] for label in self.sources}

    def final_answers(self, label: str, completions: Sequence[str]) -> list[str | None]:
        """What a verifier takes for the final answer of each completion; None where there is none, or it failed."""
        units = [RewardCall(rows=[i], texts=[text]) for i, text in enumerate(completions)]
        outcomes = self._runners[label].run(units)
        return [outcome.answers[0] if outcome.answers else None for outcome in outcomes]

    def _ask(self, label: str, rollouts: Rollouts, seed: tuple[int | str, ...]) -> SourceResult:
        source, runner, started = self.sources[label], self._runners[label], time.perf_counter()
        rows = [i for i in range(len(rollouts)) if _applies(label, source.when, rollouts, i)]
        parts = [[row] for row in rows] if source.rowwise else [rows] if rows else []
        asked, todo = SourceResult(answers=[math.nan] * len(rollouts)), parts
        for tries_left in range(source.retries, -1, -1):
            if not todo:
                break
            outcomes = runner.run([_unit(source, rollouts, part, (*seed, label)) for part in todo])
            failed = [
                part for part, outcome in zip(todo, outcomes, strict=True) if outcome.kind in ("error", "timeout")
            ]
            again = failed if tries_left else []
            for part, outcome in zip(todo, outcomes, strict=True):
                _take(asked, label, source, part, outcome, final=part not in again)
            todo = again
        if runner.shared:
            _take_shared_logs(asked, label, source, parts)
        asked.seconds = time.perf_counter() - started
        return asked


def _in_thread(work: Callable[..., SourceResult], *arguments: Any) -> Future[SourceResult]:
    """The result of some work in a thread that does not keep the interpreter from ending."""
    future: Future[SourceResult] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="hf_rlhf-reward", daemon=True).start()
    return future


def _unit(source: RewardSource, rollouts: Rollouts, part: list[int], seed: tuple[int | str, ...]) -> RewardCall:
    """A call's rows, copied: a source may change what it gets."""
    seeds = len(seed) > 1 and (source.draws or not source.rowwise)
    own = rollouts.select(part)
    for name in ("prompt_ids", "completion_ids", "masks"):
        setattr(own, name, [copy.copy(row) for row in getattr(own, name)])
    own.prompts = [_copied(prompt) for prompt in own.prompts]
    own.columns = {name: [_copied(value) for value in values] for name, values in own.columns.items()}
    return RewardCall(rows=part, rollouts=own, seed=seed_of(*seed, part[0]) if seeds else None)


def _copied(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else copy.deepcopy(value)


def _applies(label: str, when: Mapping[str, Any] | None, rollouts: Rollouts, row: int) -> bool:
    for name, wanted in (when or {}).items():
        value = rollouts.column(name)[row]
        if isinstance(value, list | dict) or getattr(value, "shape", ()) != ():
            raise RewardError(
                f"reward {label!r}: when={{{name}: ...}} compares single values, and row {row} has a {type(value).__name__}"
            )
        if value not in wanted if isinstance(wanted, list) else value != wanted:
            return False
    return True


def _take(
    asked: SourceResult, label: str, source: RewardSource, part: list[int], outcome: CallResult, final: bool
) -> None:
    """Puts what came of a call into place; a failure only where it is not tried again."""
    if outcome.kind == "wrong":
        raise RewardError(outcome.reason)
    for name, values in outcome.metrics.items():
        asked.metrics.setdefault(name, []).extend(values)
    if not outcome.kind:
        for row, answer in zip(part, outcome.answers, strict=True):
            asked.answers[row] = answer
        for name, column in outcome.columns.items():
            _take_column(asked, label, name, part, column)
    elif final:
        given = math.nan if isinstance(source.on_error, str) else float(source.on_error)
        for row in part:
            asked.answers[row] = given
            asked.failures.append(
                Failure(row=row, kind=outcome.kind, reason=outcome.reason, trace=outcome.trace, error=outcome.error)
            )


def _take_column(asked: SourceResult, label: str, name: str, part: list[int], column: list[Any]) -> None:
    if len(column) != len(part):
        logger.warning("reward %r logged %d values of %r for %d rows: dropped", label, len(column), name, len(part))
        return
    kept = asked.columns.setdefault(name, [None] * len(asked.answers))
    for row, value in zip(part, column, strict=True):
        kept[row] = value


def _take_shared_logs(asked: SourceResult, label: str, source: RewardSource, parts: list[list[int]]) -> None:
    """Metrics of calls that ran beside each other; a column only where there was one call."""
    columns, asked.metrics = logs_of(label, source)
    for name, column in columns.items():
        if len(parts) == 1:
            _take_column(asked, label, name, parts[0], column)
        else:
            logger.warning(
                "reward %r logs a column %r row by row beside other rows, so that nobody can tell whose a value is: dropped; "
                "workers=inline and workers=processes keep it",
                *(label, name),
            )


@dataclass
class _Budget:
    """How often a source failed lately."""

    over: int = 0
    """Times in a row that it was judged beyond its budget."""
    judged: bool = False
    rows: int = 0
    """Rows, and failures among them, since it was judged last."""
    failures: int = 0

    def judge(self, label: str, source: RewardSource, asked: SourceResult, counts: bool) -> None:
        """Warns of failures, which count or not. Raises `RewardError` where the source's settings say that they end the run."""
        failed = {failure.row for failure in asked.failures}
        if counts:
            self.rows += len(failed) + sum(not (_is_missing(x) or i in failed) for i, x in enumerate(asked.answers))
            self.failures += len(failed)
        if asked.failures:
            self._report(label, source, asked)
        if self.rows >= ENOUGH:
            share, first = self.failures / self.rows, not self.judged
            self.over = self.over + 1 if share > source.failure_budget else 0
            self.rows, self.failures, self.judged = 0, 0, True
            if (share == 1 and first) or self.over >= PATIENCE:
                self._end(label, source, asked, first)

    def _report(self, label: str, source: RewardSource, asked: SourceResult) -> None:
        reasons: dict[str, list[Failure]] = {}
        for failure in asked.failures:
            reasons.setdefault(failure.reason, []).append(failure)
        if source.on_error == "raise":
            first = asked.failures[0]
            rows = _named([failure.row for failure in asked.failures])
            raise RewardError(f"{_title(label, source)} {first.reason}, {rows}") from first.error
        given = "no score" if isinstance(source.on_error, str) else f"{source.on_error:g}"
        for reason, failures in list(reasons.items())[:10]:
            rows = _named([failure.row for failure in failures])
            logger.warning("%s %s: %s, %s", _title(label, source), reason, rows, f"which get {given}")
        if len(reasons) > 10:
            logger.warning("%s failed for %d further reasons", _title(label, source), len(reasons) - 10)
        if asked.failures[-1].trace:
            logger.warning("the last of them:\n%s", asked.failures[-1].trace)

    def _end(self, label: str, source: RewardSource, asked: SourceResult, first: bool) -> None:
        last = asked.failures[-1] if asked.failures else None
        why = (
            "as for every row so far"
            if first
            else f"and more than {source.failure_budget:.0%} of its rows failed {PATIENCE} times in a row; "
            "rewards.*.failure_budget allows more"
        )
        said = f"{_title(label, source)} {last.reason if last else 'failed'}, {why}"
        raise RewardError(f"{said}\n{last.trace if last else ''}".rstrip()) from (last.error if last else None)


def _title(label: str, source: RewardSource) -> str:
    return f"reward {label!r} ({type(source).__name__})"


def _named(rows: Sequence[int]) -> str:
    """`row 3`, `rows 3, 4`, `rows 0, 1, ... and 54 more`."""
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:10]))}{more}"


def _is_missing(answer: Answer) -> bool:
    return isinstance(answer, float) and math.isnan(answer)


def totals(answers: dict[str, list[Answer]], rollouts: Rollouts) -> dict[str, Tensor]:
    """label -> (n,) float64: the number, or the sum over steps or over the tokens that the policy sampled."""
    return {
        label: torch.tensor(
            [_sum(answer, mask) for answer, mask in zip(given, rollouts.masks, strict=True)], dtype=torch.float64
        )
        for label, given in answers.items()
    }


def _sum(answer: Answer, mask: Sequence[int]) -> float:
    if isinstance(answer, Spans):
        return math.fsum(value for _, value in answer.values)
    if isinstance(answer, TokenScores):
        return math.fsum(value * m for value, m in zip(answer.values, mask, strict=True))
    return answer


def place(answers: Sequence[Answer], rollouts: Rollouts, tokenizer: Any, width: int) -> Tensor:
    """(n, width) float64, each reward of one source at its token.

    A number stands at the row's last sampled token, a step's value at the token that holds the step's last character, or
    at the sampled token before it where a tool wrote that one (the first one where none comes before).
    """
    placed = torch.zeros(len(answers), width, dtype=torch.float64)
    for row, answer in enumerate(answers):
        mask, ids = rollouts.masks[row], rollouts.completion_ids[row]
        sampled = [i for i, m in enumerate(mask) if m]
        if not sampled:
            continue
        if isinstance(answer, TokenScores):
            placed[row, : len(ids)] = torch.tensor(answer.values, dtype=torch.float64) * torch.tensor(mask)
        elif isinstance(answer, Spans):
            characters = cache(lambda i, ids=ids: _characters(tokenizer, ids[: i + 1]))
            for end, value in answer.values:
                token = bisect_left(range(len(ids)), end, key=characters)
                placed[row, sampled[max(0, bisect_right(sampled, token) - 1)]] += value
        elif not math.isnan(answer):
            placed[row, sampled[-1]] = answer
    return placed


def _characters(tokenizer: Any, ids: list[int]) -> int:
    """How many characters of the completion the first tokens make; half a character does not count."""
    return len(tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd"))


def total(scores: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    """(n,) the weighted sum of the sources that apply to each row, and (n,) bool, False where none does."""
    stacked = torch.stack([scores[label] for label in weights])
    factors = torch.tensor(list(weights.values()), dtype=stacked.dtype).unsqueeze(1).to(stacked.device)
    return (stacked.nan_to_num(0.0) * factors).sum(0), ~stacked.isnan().all(0)
