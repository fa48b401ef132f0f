"""Seconds of phases from the folders of runs, and the work that took them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hf_rlhf.config.recipe import OfflineRecipe
from hf_rlhf.report.run_data import RunData, read_runs
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training.planner.devices import Constants, Device, fit
from hf_rlhf.training.planner.layouts import placed, policy_of, work_of
from hf_rlhf.training.planner.work import Phases

TIMES = {
    "rollout": "time/rollout_s",
    "forward": "time/forward_s",
    "reward": "time/reward_wait_s",
    "update": "time/update_s",
}


class Measured(NamedTuple):
    """Constants of phases; the relative deviation of the seconds of rollouts; mean tokens of a completion."""

    constants: Constants
    spread: float
    mean: float | None


def measure(folders: Sequence[str], device: Device, name: str) -> Measured:
    """Fit constants to runs on such a device. Raises `UserError` for folders without a run of a recipe with rollouts."""
    runs = read_runs([Path(folder) for folder in folders])
    points = [seconds_of(run) for run in runs]
    rollouts = [x for run in runs for x in relative(series(run, TIMES["rollout"]))]
    lengths = [x for run in runs for x in series(run, "rollout/length/mean")]
    found = [(work_of_run(run, name), seconds) for run, seconds in zip(runs, points, strict=True)]
    return Measured(fit(device, found), statistics.pstdev(rollouts), statistics.fmean(lengths))


def series(run: RunData, metric: str) -> list[float]:
    """Return a metric's values in training; the first step, which warms up, is left out where there are others."""
    found = [entry[metric] for entry in run.entries if "loss" in entry and metric in entry]
    return found[1:] or found


def relative(values: Sequence[float]) -> list[float]:
    """Return values over their mean."""
    return [x / statistics.fmean(values) for x in values]


def seconds_of(run: RunData) -> dict[str, float]:
    """Return the median seconds of each phase of a step, a rollout with its updates."""
    if run.recipe is None or isinstance(run.recipe, OfflineRecipe) or not series(run, TIMES["update"]):
        raise UserError(
            f"--measured must be the folder of a run with rollouts, got {run.folder}. Leave it out, or train a few steps"
        )
    a = run.recipe.algorithm()
    found = {phase: statistics.median(series(run, name) or [0.0]) for phase, name in TIMES.items()}
    if not a.rollout.local:  # an engine's devices are not known
        del found["rollout"]
    return {**found, "update": a.steps_per_rollout * found["update"]}


def work_of_run(run: RunData, device: str) -> Phases:
    """Return the work of a step of a run's processes."""
    recipe, summary = run.recipe, run.summary.get("plan", {}).get("arithmetic", [])
    assert recipe is not None
    processes = next((int(value) for quantity, value, _ in summary if quantity == "processes"), 1)
    sharded = bool(recipe.training.get("fsdp"))
    args = placed(recipe.training_arguments(), processes, device, sharded)
    mean = statistics.fmean(series(run, "rollout/length/mean"))
    return work_of(recipe, policy_of(recipe), args, processes if sharded else 1, mean)
