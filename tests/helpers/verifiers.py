"""What the tests of verifiers share: rows, the graded solutions of GSM8K, hostile texts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_rlhf.batch import Rollouts
from hf_rlhf.contract.reward_source import RewardSource

HOSTILE = [
    "(" * 100_000,
    "[" * 50_000 + "]" * 50_000,
    r"\boxed{" * 20_000,
    "answer" + " " * 100_000,
    "answer: **" * 10_000,
    "9" * 100_000,
    "1,000" * 20_000,
    "1/" * 50_000,
    "9^" * 50_000,
    "-" * 100_000 + "1",
    "\n" * 100_000,
    "a." * 50_000,
    "<<" * 50_000,
    "*" * 100_000,
    r"\(" * 50_000,
    "```json\n" * 13_000,
    "\ud800 é\u2028\0",
]
"""Texts on which a careless regular expression takes minutes."""


def rows(completions: list[str], *, masks: Any = None, ids: Any = None, **columns: list[Any]) -> Rollouts:
    count = len(completions)
    return Rollouts(
        prompts=["p"] * count,
        completions=completions,
        prompt_ids=[[1]] * count,
        completion_ids=ids or [[2]] * count,
        masks=masks or [[1] * len(row) for row in ids or [[2]] * count],
        finish_reasons=["stop"] * count,
        columns=columns,
        group_ids=list(range(count)),
    )


def graded(folder: Path) -> tuple[Rollouts, list[float]]:
    """The solutions of two models to the test problems of GSM8K, and for each 1 where it is published as correct, else 0."""
    with open(folder / "example_model_solutions.jsonl", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    found = [
        (solution["solution"], problem["ground_truth"], float(solution["is_correct"]))
        for problem in problems
        for solution in problem.values()
        if isinstance(solution, dict)
    ]
    texts, references, correct = (list(part) for part in zip(*found, strict=True))
    return rows(texts, answer=references), correct


def scored(source: RewardSource, batch: Rollouts) -> list[Any]:
    """What a source gives, called with all rows."""
    given: Any = source(batch)
    return list(given)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """What runs in it takes less, processor time of this process alone."""
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds
