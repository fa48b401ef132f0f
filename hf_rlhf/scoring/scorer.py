"""Scorer, which calls reward sources with their runners, validates answers, counts failures and combines scores.

Rows to which a source does not apply are distinguished from a score of 0.
"""

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
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Context, Rollouts, Spans, TokenScores
from hf_rlhf.runtime.seeding import seed_of
from hf_rlhf.scoring.answers import Answer, RewardError
from hf_rlhf.scoring.completion_text import CompletionText
from hf_rlhf.scoring.failures import Failure, FailureBudget, SourceResult
from hf_rlhf.scoring.runners import CallResult, RewardCall, Runner, never, runner_for
from hf_rlhf.scoring.runners.isolation import isolated
from hf_rlhf.scoring.runners.reward_call import logs_of

logger = logging.getLogger(__name__)
ANSWERS = 16
"""Completions of a process in which a verifier looks for an answer where it calls none right."""
Add = Callable[[str, float, float], None]
"""(name of an average, total, number of items) of this process."""


class Scorer:
    """Reward sources with their runners.

    `context` is passed to the sources' `setup`; without it they must be set up already, or need no setup. Sources that do
    not run in the caller's thread run in parallel, with workers for `requests` calls of `ask` at a time. `close` stops
    workers and sources.
    """

    def __init__(
        self, sources: Sequence[tuple[str, RewardSource]], context: Context | None = None, *, requests: int = 1
    ) -> None:
        self.sources, self._requests = dict(sources), requests
        if len(self.sources) < len(sources):
            raise ValueError("reward sources must have distinct labels. Set a `label` for each")
        self._runners: dict[str, Runner] = {}
        self._budgets: dict[str, FailureBudget] = {label: FailureBudget() for label in self.sources}
        self._ends = ExitStack()
        try:
            for label, source in sources:
                if source.workers not in ("processes", "ray"):
                    self._ends.callback(source.close)
                self._runners[label] = runner = runner_for(label, source, context, requests)
                self._ends.callback(runner.close)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Wait until every source can score. Closes all and raises `RewardError` if one cannot."""
        try:
            for runner in self._runners.values():
                runner.wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop all workers and close all sources that were set up here, even if one of them raises."""
        self._ends.close()

    @property
    def inline(self) -> bool:
        """Return True if a source runs in the caller's thread, so that `ask` serves one request at a time."""
        return any(runner.inline for runner in self._runners.values())

    def ask(
        self, rollouts: Rollouts, *seed: int | str, counts: bool = True, is_cancelled: Callable[[], bool] = never
    ) -> dict[str, SourceResult]:
        """Score the rows with all sources and return their results by label.

        `seed` is combined with the label and the row to seed the global generators during calls, which the caller must
        save. With `counts`, failures count towards the budget. Rows that are not scored before `is_cancelled` turns true
        have no answer. Each source gets its own copy of the rows. Raises
        `RewardError` if a source returns an invalid answer, fails with `on_error: raise`, or exceeds its budget.
        """
        with isolated():
            asked = self._ask_all(rollouts, seed, is_cancelled)
        for label in self.sources:
            self._budgets[label].judge(label, self.sources[label], asked[label], counts)
        return {label: asked[label] for label in self.sources}

    def _ask_all(
        self, rollouts: Rollouts, seed: tuple[int | str, ...], is_cancelled: Callable[[], bool]
    ) -> dict[str, SourceResult]:
        inline = [label for label, runner in self._runners.items() if runner.inline]
        apart = {
            label: _in_thread(self._ask, label, rollouts, seed, is_cancelled)
            for label in self._runners
            if label not in inline
        }
        try:
            asked = {label: self._ask(label, rollouts, seed, is_cancelled) for label in inline}
        except Exception:
            for future in apart.values():
                future.exception()  # wait for the others
            raise
        return asked | {label: future.result() for label, future in apart.items()}

    def final_answers(self, label: str, completions: Sequence[str]) -> list[str | None]:
        """Return the final answer that a verifier extracts from each completion; None if there is none, or it failed."""
        units = [RewardCall(rows=[i], texts=[text]) for i, text in enumerate(completions)]
        outcomes = self._runners[label].run(units)
        return [outcome.answers[0] if outcome.answers else None for outcome in outcomes]

    def count_answered(self, add: Add, rollouts: Rollouts, reported: Mapping[str, float]) -> None:
        """Count completions with an answer of any kind, for verifiers whose mean score in `reported` is 0."""
        for label, source in self.sources.items():
            if source.verifier and reported.get(f"reward/{label}/mean") == 0:
                found = self.final_answers(label, rollouts.turns()[:ANSWERS])
                add(f"reward/{label}/answered_frac", sum(x is not None for x in found), len(found))

    def _ask(
        self, label: str, rollouts: Rollouts, seed: tuple[int | str, ...], is_cancelled: Callable[[], bool]
    ) -> SourceResult:
        source, runner, started = self.sources[label], self._runners[label], time.perf_counter()
        ended = unscored(rollouts)
        rows = [
            i for i in range(len(rollouts)) if i not in ended and applies(f"reward {label!r}", source.when, rollouts, i)
        ]
        parts = [[row] for row in rows] if source.rowwise else [rows] if rows else []
        asked, todo = SourceResult(answers=[math.nan] * len(rollouts)), parts
        for tries_left in range(source.retries, -1, -1):
            if not todo:
                break
            outcomes = runner.run([_unit(source, rollouts, part, (*seed, label)) for part in todo], is_cancelled)
            failed = [
                part for part, outcome in zip(todo, outcomes, strict=True) if outcome.kind in ("error", "timeout")
            ]
            again = failed if tries_left else []
            for part, outcome in zip(todo, outcomes, strict=True):
                _take(asked, label, source, part, outcome, final=part not in again)
            todo = again
        if runner.shared and self._requests == 1:
            _take_shared_logs(asked, label, source, parts)
        elif runner.shared:
            logs_of(label, source)  # of several requests, so they belong to none
        asked.seconds = time.perf_counter() - started
        return asked


def _in_thread(work: Callable[..., SourceResult], *arguments: Any) -> Future[SourceResult]:
    """Run work in a daemon thread and return its future."""
    future: Future[SourceResult] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="hf_rlhf-reward", daemon=True).start()
    return future


def _unit(source: RewardSource, rollouts: Rollouts, part: list[int], seed: tuple[int | str, ...]) -> RewardCall:
    """Create a call with copies of its rows, which the source may change."""
    seeds = len(seed) > 1 and (source.draws or not source.rowwise)
    own = rollouts.select(part)
    for name in ("prompt_ids", "completion_ids", "masks"):
        setattr(own, name, [copy.copy(row) for row in getattr(own, name)])
    own.prompts = [copied(prompt) for prompt in own.prompts]
    own.columns = {name: [copied(value) for value in values] for name, values in own.columns.items()}
    return RewardCall(rows=part, rollouts=own, seed=seed_of(*seed, part[0]) if seeds else None)


def copied(value: Any) -> Any:
    """Return a copy of a column's value."""
    return value if isinstance(value, str | int | float | None) else copy.deepcopy(value)


def applies(who: str, when: Mapping[str, Any] | None, rollouts: Rollouts, row: int) -> bool:
    """Return whether a plugin with this `when` applies to a row; `who` is its name in errors."""
    for name, wanted in (when or {}).items():
        value = rollouts.column(name)[row]
        if isinstance(value, list | dict) or getattr(value, "shape", ()) != ():
            raise RewardError(
                f"{who}: when={{{name}: ...}} needs scalar values, but row {row} has a {type(value).__name__}"
            )
        if value not in wanted if isinstance(wanted, list) else value != wanted:
            return False
    return True


def unscored(rollouts: Rollouts) -> set[int]:
    """Return the rows that no source scores: of episodes that ran out of turns or tokens, or whose environment failed."""
    ends, rewards = rollouts.columns.get("episode/end", ()), rollouts.columns.get("episode/reward", ())
    return {i for i, (end, given) in enumerate(zip(ends, rewards, strict=True)) if end != "played" and given is None}


def _take(
    asked: SourceResult, label: str, source: RewardSource, part: list[int], outcome: CallResult, final: bool
) -> None:
    """Store the result of a call; a failure only if it is not retried."""
    if outcome.kind == "wrong":
        raise RewardError(outcome.reason)
    if outcome.kind == "cancelled":
        return
    for name, values in outcome.metrics.items():
        asked.metrics.setdefault(name, []).extend(values)
    if not outcome.kind:
        asked.invalid += outcome.invalid
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
        logger.warning("reward %r logged %d values of %r for %d rows; dropped", label, len(column), name, len(part))
        return
    kept = asked.columns.setdefault(name, [None] * len(asked.answers))
    for row, value in zip(part, column, strict=True):
        kept[row] = value


def _take_shared_logs(asked: SourceResult, label: str, source: RewardSource, parts: list[list[int]]) -> None:
    """Store the metrics of parallel calls, and columns if there was only one call."""
    columns, asked.metrics = logs_of(label, source)
    for name, column in columns.items():
        if len(parts) == 1:
            _take_column(asked, label, name, parts[0], column)
        else:
            logger.warning(
                "reward %r logs a column %r from parallel calls, so that values cannot be assigned to rows; dropped. Set "
                "%s or %s to keep it",
                *(label, name, source.override("workers=inline"), source.override("workers=processes")),
            )


def totals(answers: dict[str, list[Answer]], rollouts: Rollouts) -> dict[str, Tensor]:
    """Return totals (n,) in float64 by label: the number, or the sum over steps or over sampled tokens."""
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


def place(answers: Sequence[Answer], rollouts: Rollouts, text: CompletionText, width: int) -> Tensor:
    """Place each reward of a source at its token: (n, width) in float64.

    A number is placed at the row's last sampled token, a step's value at the token with the step's last character, or, if
    that is a tool token, at the last sampled token before it (the first one if there is none).
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
            prompt = rollouts.prompt_ids[row]
            characters = cache(lambda i, ids=ids, prompt=prompt: text.characters(prompt, ids[: i + 1]))
            for end, value in answer.values:
                token = bisect_left(range(len(ids)), end, key=characters)
                placed[row, sampled[max(0, bisect_right(sampled, token) - 1)]] += value
        elif not math.isnan(answer):
            placed[row, sampled[-1]] = answer
    return placed


def total(scores: dict[str, Tensor], weights: dict[str, float], rows: int) -> tuple[Tensor, Tensor]:
    """Return the weighted sum (n,) of the sources that apply to each row, and a bool mask (n,), False where none does.

    Without any source the sum is 0 and every row counts.
    """
    if not weights:
        return torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.bool)
    stacked = torch.stack([scores[label] for label in weights])
    factors = torch.tensor(list(weights.values()), dtype=stacked.dtype).unsqueeze(1).to(stacked.device)
    return (stacked.nan_to_num(0.0) * factors).sum(0), ~stacked.isnan().all(0)


def reference_column(sources: Sequence[RewardSource]) -> str | None:
    """Return the column with the reference answers: the only one that the first verifier, or else source, reads."""
    ordered = sorted(sources, key=lambda source: not source.verifier)
    return next((next(iter(read)) for source in ordered if len(read := source.columns()) == 1), None)
