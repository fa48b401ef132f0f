"""Overhead per row of the contract of reward sources: the part `rewards` of `benchmarks.micro`."""

from __future__ import annotations

import time
from contextlib import ExitStack

from benchmarks.micro_parts import Part, Variants, part
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts
from hf_rlhf.scoring.scorer import Scorer


class Ones(RewardSource):
    """Gives each row 1."""

    name = "ones"

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [1.0] * len(rollouts)


class OnesApart(Ones):
    """The same, row by row."""

    rowwise = True


def rewards(rows: int, times: int) -> Part:
    """Measure the overhead of the contract per row, for each runner, in wall-clock seconds with idle workers."""
    text = " ".join(["word"] * 60)
    ids = list(range(200))
    given = Rollouts(
        prompts=["prompt"] * rows,
        completions=[text] * rows,
        prompt_ids=[ids] * rows,
        completion_ids=[list(ids) for _ in range(rows)],
        masks=[[1] * len(ids) for _ in range(rows)],
        finish_reasons=["stop"] * rows,
        columns={"answer": ["5"] * rows, "question": [text] * rows},
        group_ids=list(range(rows)),
    )
    sources: dict[str, RewardSource] = {
        "one call, inline": Ones(),
        "row by row, inline": OnesApart(),
        "row by row, threads": OnesApart(workers="threads"),
        "row by row, processes": OnesApart(workers="processes"),
    }
    seconds = dict.fromkeys(["called directly", *sources], float("inf"))
    with ExitStack() as stack:
        scorers = {name: stack.enter_context(Scorer([("ones", source)])) for name, source in sources.items()}
        calls: Variants = {
            name: lambda scorer=scorer: scorer.ask(given, 0, "reward") for name, scorer in scorers.items()
        }
        calls = {"called directly": lambda: Ones()(given), **calls}
        for run in calls.values():
            run()
        for _ in range(times):
            for name, run in calls.items():
                began = time.perf_counter()
                run()
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    entries = [{"variant": name, "seconds": x / rows} for name, x in seconds.items()]
    said = (
        f"One of {rows} rows of 200 tokens, by a source that gives 1: copies, cutting into rows, time limits, checks."
    )
    return part("Reward sources", said, (), entries, compared=False)
