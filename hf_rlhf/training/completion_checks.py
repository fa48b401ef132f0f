"""Checks of what a rollout engine returned."""

from __future__ import annotations

from hf_rlhf.batch import Completions
from hf_rlhf.config.algorithm import Algorithm


def check_completions(algorithm: Algorithm, completions: Completions, rows: int, sampled: bool, version: str) -> None:
    """Raise `ValueError` naming the engine unless it returned `rows` completions, each with what belongs to it.

    `sampled`: at the temperature of the recipe, so that log-probs may be needed. `version`: the weights that they were asked
    from, which are recorded in `Completions.versions`.
    """
    name = algorithm.rollout.name
    if not isinstance(completions, Completions):
        raise ValueError(f"rollout={name} must return Completions, got {type(completions).__name__}")
    if len(completions.ids) != rows or len(completions.finish_reasons) != rows:
        raise ValueError(f"rollout={name} must return {rows} completions, got {len(completions.ids)}")
    empty = [i for i, ids in enumerate(completions.ids) if not ids]
    if empty:
        raise ValueError(
            f"rollout={name} returned empty completions in rows {empty}. A completion holds at least one token; the "
            "end-of-sequence token counts"
        )
    if completions.routed_experts is not None:
        raise ValueError(
            f"rollout={name} returned routed_experts, which are reserved: no version reads them yet. Leave them out"
        )
    for what in ("masks", "logps"):
        for i, values in enumerate(getattr(completions, what) or ()):
            if len(values) != len(completions.ids[i]):
                raise ValueError(
                    f"rollout={name} must return one of {what} per token, the end-of-sequence token included: row {i} has "
                    f"{len(completions.ids[i])} tokens, got {len(values)}"
                )
    if completions.episodes is not None or completions.agents is not None:
        raise ValueError(
            f"rollout={name} returned episodes or agents, which environments alone set. Return one row per completion"
        )
    for i, (ids, forks) in enumerate(
        zip(completions.ids, completions.forks or (), strict=True) if completions.forks else ()
    ):
        starts = [start for start, _ in forks]
        if starts != sorted({start for start in starts if 0 <= start < len(ids)}) or not all(own for _, own in forks):
            raise ValueError(
                f"rollout={name} must return forks in the order of their starts, 0 to {len(ids) - 1} in row {i}, each with the "
                f"tokens that stand before it: got starts {starts}"
            )
    if sampled and completions.logps is None and algorithm.compares_sampler:
        raise ValueError(
            f"rollout={name} declares sampler_logps but returned no log-probs. Return them with every completion, or set "
            "rollout_correction.use=none"
        )
    completions.versions = completions.versions or [version] * rows
    others = sorted({*completions.versions} - {version})
    if others or len(completions.versions) != rows:
        raise ValueError(
            f"rollout={name} must sample every row from the weights {version}, got {len(completions.versions)} rows from "
            f"{', '.join(sorted({*completions.versions}))}. Take the weights of `load` before sampling"
        )
