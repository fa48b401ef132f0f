"""`builtin:addition` for recipes without rollouts: four kinds of rows from the problems of `hf_rlhf.data.addition_task`.

    demonstration  prompt `37+58=`, the right sum is the completion
    preference     prompt `37+58=`, the right sum is chosen, a wrong one rejected
    stepwise       the sum of the units and the sum as two steps, each right or wrong
    spans          one answer, each of its digits labelled right or wrong

Wrong answers are near misses (a digit off by one, replaced, dropped or added) or other sums; half of the steps and answers of
the last two kinds are wrong. Rows are the same in every run; the 512 held-out problems are those of the quickstart.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.data.addition_task import BUILTIN, SUMS, addition_dataset
from hf_rlhf.data.sources import DatasetError


def demo_rows(trainer: OfflineTrainer) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and held-out rows. Raises `DatasetError` if there are none of the trainer's kind."""
    if trainer.rows not in KINDS:
        raise DatasetError(
            f"{BUILTIN} has no rows for trainer={trainer.name}: it has {', '.join(KINDS)}; set dataset.path (--dataset)"
        )
    make = KINDS[trainer.rows]
    draw = random.Random(f"addition {trainer.rows}")
    train, held_out = ([make(row, draw) for row in rows] for rows in addition_dataset())
    return train, held_out


def wrong_answer(right: str, draw: random.Random) -> str:
    """Return another number: a possible sum, or the right one with a digit off by one, replaced, dropped or added."""
    while True:
        place, digit = draw.randrange(len(right)), draw.choice("0123456789")
        near = str((int(right[place]) + draw.choice((1, 9))) % 10)
        wrong = draw.choice(
            (
                str(draw.choice(SUMS)),
                *(right[:place] + near + right[place + 1 :],) * 2,
                right[:place] + digit + right[place + 1 :],
                right[:place] + right[place + 1 :],
                right[: place + 1] + digit + right[place + 1 :],
            )
        )
        if wrong and wrong != right:
            return wrong


def _demonstration(row: dict[str, str], draw: random.Random) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["answer"]}


def _preference(row: dict[str, str], draw: random.Random) -> dict[str, Any]:
    right = row["answer"]
    return {"prompt": row["prompt"], "chosen": right, "rejected": wrong_answer(right, draw)}


def _stepwise(row: dict[str, str], draw: random.Random) -> dict[str, Any]:
    a, b = row["prompt"].removesuffix("=").split("+")
    right = [str(int(a) % 10 + int(b) % 10), row["answer"]]
    given = [wrong_answer(step, draw) if draw.random() < 0.5 else step for step in right]
    labels = [step == own for step, own in zip(given, right, strict=True)]
    return {"prompt": row["prompt"], "completions": given, "labels": labels}


def _spans(row: dict[str, str], draw: random.Random) -> dict[str, Any]:
    right = row["answer"]
    given = right
    while draw.random() < 0.5 and given == right:
        drawn = wrong_answer(right, draw)
        given = drawn if len(drawn) == len(right) else right
    spans = [
        {"start": i, "end": i + 1, "label": float(x == y)} for i, (x, y) in enumerate(zip(given, right, strict=True))
    ]
    return {"prompt": row["prompt"], "completion": given, "spans": spans}


KINDS: dict[str, Callable[[dict[str, str], random.Random], dict[str, Any]]] = {
    "demonstration": _demonstration,
    "preference": _preference,
    "stepwise": _stepwise,
    "spans": _spans,
}
