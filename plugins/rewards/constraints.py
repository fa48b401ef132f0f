"""Share of verifiable instructions that the completion follows (IFEval, arXiv:2311.07911).

The rows of IFEval's dataset work unchanged. `_instructions` lists the instructions and the departures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts

from ._instructions import Check, follows, instruction
from ._languages import known


@dataclass(kw_only=True)
class Constraints(RewardSource):
    """Share of the row's instructions that the completion follows, or 1.0 for all and 0.0 otherwise; no score without any."""

    name = "constraints"
    verifier = True
    rowwise = True

    column: str = "instruction_id_list"
    """Dataset column with the ids of each row's instructions, e.g. ["punctuation:no_comma"], as a list or as JSON text."""
    kwargs_column: str = "kwargs"
    """Dataset column with the keyword arguments of each instruction; null ones are ignored."""
    instructions: list[dict[str, Any]] | None = None
    """Instructions for all rows instead of the columns, e.g. [{id: length_constraints:number_words, relation: at least,
    num_words: 50}]."""
    mode: Literal["strict", "loose"] = "strict"
    """`strict`: check the completion as it is; `loose`: also accept it without its first line, its last line or both, and
    without asterisks (section 2.2 of the paper)."""
    score: Literal["share", "all"] = "share"
    """Share of instructions followed, or all or nothing."""

    def __post_init__(self) -> None:
        self._checks: list[Check] | None = None
        if self.instructions is not None:
            without = [given for given in self.instructions if "id" not in given]
            if without or not self.instructions:
                raise ValueError(
                    f"instructions must each have an id, e.g. [{{id: punctuation:no_comma}}], got {without}"
                )
            arguments = [{key: x for key, x in given.items() if key != "id"} for given in self.instructions]
            self._checks = _checks([given["id"] for given in self.instructions], arguments)

    def prepare(self) -> None:
        known()

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        if self._checks is not None:
            return [self._score(completion, self._checks) for completion in rollouts.completions]
        columns = (rollouts.column(self.column), rollouts.column(self.kwargs_column))
        return [
            self._score(completion, _checks(_listed(ids), _listed(kwargs)))
            for completion, ids, kwargs in zip(rollouts.completions, *columns, strict=True)
        ]

    def columns(self) -> set[str]:
        return {self.column, self.kwargs_column} if self.instructions is None else set()

    def _score(self, completion: str, checks: list[Check]) -> float | None:
        if not checks:
            return None
        followed = [follows(completion, check, self.mode == "loose") for check in checks]
        return float(all(followed)) if self.score == "all" else sum(followed) / len(followed)


def _listed(given: Any) -> list[Any]:
    return list(json.loads(given) if isinstance(given, str) else given or [])


def _checks(ids: list[str], kwargs: Sequence[dict[str, Any] | None]) -> list[Check]:
    """Return the checks of instructions. Raises `ValueError` unless there are as many arguments as ids."""
    if ids and len(ids) != len(kwargs):
        raise ValueError(
            f"rewards.constraints: each of {len(ids)} instructions must have keyword arguments, got {len(kwargs)} sets"
        )
    return [instruction(name, arguments or {}) for name, arguments in zip(ids, kwargs, strict=False)]


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Constraints]
