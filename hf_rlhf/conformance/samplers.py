"""Checks of samplers of prompts, as functions that raise AssertionError."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hf_rlhf.axes import PromptSampler
from hf_rlhf.batch import Prompt
from hf_rlhf.conformance.common import (
    Checks,
    duplicate,
    generators_now,
    second_of_two_processes,
    through_a_file,
)
from hf_rlhf.data.prompt_stream import PromptStream

ROWS = 23


def sampler_checks(plugin: PromptSampler) -> Checks:
    """Yield the checks of a sampler."""
    yield "it draws as many rows of the dataset as it is asked for", lambda: _draws_rows(plugin)
    yield "every process draws the same rows", lambda: _is_equal_on_every_process(plugin)
    yield "random numbers come from the generator that it gets", lambda: _draws_from_its_generator(plugin)
    yield "it observes late, and rows without a score", lambda: _observes_late(plugin)
    yield "resumed from a checkpoint it draws the same rows", lambda: _resumes(plugin)


class _Run:
    """Rollouts of a run with a dataset of `ROWS` rows, in which even rows are solved."""

    def __init__(self, plugin: PromptSampler, seed: int = 0, rows: int = ROWS) -> None:
        prompts = [Prompt(ids=[row], prompt=str(row)) for row in range(rows)]
        self.stream = PromptStream(prompts, seed=seed, sampler=plugin)

    def rollout(self, count: int, observed: bool = True) -> list[int]:
        """Draw prompts, and observe two completions of each."""
        self.stream.begin_rollout()
        rows = [prompt.ids[0] for prompt in self.stream.next(count)]
        if observed:
            scores = [score for row in rows for score in (float(row % 2 == 0), math.nan if row == 3 else 0.25)]
            self.stream.observe([i for i in range(count) for _ in range(2)], scores)
        return rows


def _rollouts(plugin: PromptSampler, counts: Sequence[int], seed: int = 0) -> list[list[int]]:
    run = _Run(duplicate(plugin), seed)  # type: ignore[arg-type]
    return [run.rollout(count) for count in counts]


def _draws_rows(plugin: PromptSampler) -> None:
    for rows, counts in ((ROWS, (1, 4, 8, ROWS)), (4, (4, 4, 4))):
        run = _Run(duplicate(plugin), rows=rows)  # type: ignore[arg-type]
        for count in counts:
            run.rollout(count)  # the stream refuses other numbers


def _is_equal_on_every_process(plugin: PromptSampler) -> None:
    first = _rollouts(plugin, [4] * 8)
    with second_of_two_processes():
        torch.manual_seed(1)
        second = _rollouts(plugin, [4] * 8)
    assert first == second, f"process 0 draws {first}, process 1 {second}. Draw from rng alone"


def _draws_from_its_generator(plugin: PromptSampler) -> None:
    before = generators_now()
    _rollouts(plugin, [4] * 8)
    changed = [str(a) for a, b in zip(before, generators_now(), strict=True) if str(a) != str(b)]
    assert not changed, (
        "it draws from a global random generator. Draw from rng, which is seeded by run, epoch and position"
    )


def _observes_late(plugin: PromptSampler) -> None:
    run = _Run(duplicate(plugin))  # type: ignore[arg-type]
    for _ in range(8):
        run.rollout(4, observed=False)
    run.rollout(4)
    sampler = duplicate(plugin)
    assert isinstance(sampler, PromptSampler)
    sampler.observe([], [])
    sampler.observe([0, 0], [math.nan, math.nan])


def _resumes(plugin: PromptSampler) -> None:
    for before in (0, 1, 3, 7, 12):
        run, again = _Run(duplicate(plugin)), _Run(duplicate(plugin))  # type: ignore[arg-type]
        for _ in range(before):
            run.rollout(4)
        again.stream.load_state_dict(through_a_file(run.stream.state_dict()))
        want, got = ([each.rollout(4) for _ in range(12)] for each in (run, again))
        assert got == want, (
            f"resumed after {before} rollouts it draws {got[:3]}, and uninterrupted {want[:3]}. Return from state_dict what "
            "it remembers, or draw from rng alone"
        )
