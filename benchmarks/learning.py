"""Every packaged recipe on the quickstart's task, over several seeds; and whether beta controls the KL.

`python -m benchmarks.learning [RECIPE ...] [--seeds 3] [--rollouts N]`: short runs from the cached warm-up, one after the
other in this process (see benchmarks.fits for what changes on the task).
`python -m benchmarks.learning --beta`: five values of beta, for three ways to penalise the KL.
`python -m benchmarks.learning --page`: the documentation from the results, without a run.

Results go to benchmarks/results/learning.json after every recipe; a recipe that is there with all its seeds is not run again.
docs/learning.md and docs/learning.png are then regenerated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

from benchmarks.fits import RECIPES, RIGHT, fit_of, fitted, located, mark
from benchmarks.record import head, write

RESULTS = Path(__file__).parent / "results" / "learning.json"
DOCS = Path(__file__).parents[1] / "docs"
WATCHED = 256
"""Held-out problems of each measurement."""
POINTS = 8
"""Measurements in a run, besides the one before it."""

BETAS = (0.02, 0.1, 0.3, 1.0, 3.0)
PENALTIES = {
    "in_reward k1": "kl=[{use: in_reward, beta: BETA, estimator: {use: k1}}]",
    "in_loss k2": "kl=[{use: in_loss, beta: BETA, estimator: {use: k2}}]",
    "in_loss k3": "kl=[{use: in_loss, beta: BETA, estimator: {use: k3}}]",
}
BETA_ROLLOUTS = 20


def run(name: str, seed: int, rollouts: int | None = None, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """One run: rewards and right answers of its first and last tenth of rollouts, its KL at the end, its time."""
    from transformers import PrinterCallback, TrainingArguments
    from transformers.utils import logging as transformers_logging

    from benchmarks.watch import Watch
    from hf_rlhf import RLHFTrainer
    from hf_rlhf.config.recipe import resolve
    from hf_rlhf.config.training_arguments import DEFAULTS

    transformers_logging.disable_progress_bar()
    raw = fitted(name, seed, rollouts, overrides)
    recipe = resolve(located(raw), name=name)
    steps = recipe.update.mini_batches * recipe.update.epochs
    count = recipe.training["max_steps"] // steps
    train, held_out = problems(name)
    watch = Watch(held_out[:WATCHED], raw["rollout"]["max_new_tokens"], steps, max(1, count // POINTS))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(output_dir=folder, use_cpu=True, **{**DEFAULTS, **recipe.training})
        rows = {"train_dataset": train} if fit_of(name).two_lines else {}
        trainer = RLHFTrainer(None, recipe, args, callbacks=[watch], **rows)
        trainer.remove_callback(PrinterCallback)
        began = time.process_time()
        try:
            trainer.train()
        finally:
            trainer.close()
        seconds = time.process_time() - began - watch.seconds
        log = [entry for entry in trainer.state.log_history if "reward/total/mean" in entry]
    held_out_right = [watch.curve[0]["right"], watch.curve[-1]["right"]]
    given = raw["rollout"]["use"] == "mixed"  # right answers of the dataset are among its rollouts
    return {
        "recipe": name,
        "seed": seed,
        "mark": mark(raw),
        "rollouts": count,
        "steps": trainer.state.global_step,
        "learning_rate": raw["training"]["learning_rate"],
        "reward": tenths([entry["reward/total/mean"] for entry in log]),
        "right": held_out_right if given else tenths([entry[f"reward/{RIGHT}/mean"] for entry in log]),
        "kl": watch.curve[-1]["kl"],
        "held_out": held_out_right,
        "seconds": round(seconds, 1),
        "curve": watch.curve,
    }


def problems(name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Problems to train on and held-out ones, with the answers that the recipe's policy is to give."""
    from benchmarks.judges import lines
    from hf_rlhf.data.addition_task import addition_dataset

    train, held_out = addition_dataset()
    if not fit_of(name).two_lines:
        return train, held_out
    two_lined = [[{**row, "answer": "\n".join(lines(row))} for row in rows] for rows in (train, held_out)]
    return two_lined[0], two_lined[1]


def tenths(numbers: list[float]) -> list[float]:
    """Return the means of the first and of the last tenth."""
    tenth = max(1, len(numbers) // 10)
    return [sum(part) / tenth for part in (numbers[:tenth], numbers[-tenth:])]


def run_beta(penalty: str, beta: float) -> dict[str, Any]:
    """RLOO with another penalty of the KL."""
    row = {"penalty": penalty, "beta": beta, **run("rloo", 0, BETA_ROLLOUTS, penalised(penalty, beta))}
    del row["curve"]
    return row


def penalised(penalty: str, beta: float) -> tuple[str, ...]:
    """Return the override that replaces a recipe's KL penalty."""
    return (PENALTIES[penalty].replace("BETA", str(beta)),)


def results(path: Path = RESULTS) -> dict[str, Any]:
    """Return the results so far."""
    return json.loads(path.read_text()) if path.is_file() else {"runs": [], "curves": {}, "beta": []}


@contextmanager
def changed(path: Path) -> Iterator[dict[str, Any]]:
    """Load the results under a lock, to be changed and written back."""
    with FileLock(Path(tempfile.gettempdir()) / f"{path.name}.lock"):
        found = {key: results(path)[key] for key in ("runs", "curves", "beta")}
        yield found
        write(path, {**head("python -m benchmarks.learning"), **found})


def keep_recipe(name: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Replace a recipe's runs by newer ones, with the mean of their curves."""
    points = zip(*(row.pop("curve") for row in rows), strict=True)
    curve = [[round(fmean(point[key] for point in each), 4) for key in ("kl", "right")] for each in points]
    with changed(path) as found:
        found["runs"] = [row for row in found["runs"] if row["recipe"] != name] + rows
        found["curves"][name] = curve


def keep_beta(row: dict[str, Any], path: Path) -> None:
    """Replace the run with the same penalty and beta."""
    same = (row["penalty"], row["beta"])
    with changed(path) as found:
        found["beta"] = [other for other in found["beta"] if (other["penalty"], other["beta"]) != same] + [row]


def due(found: dict[str, Any], names: list[str], seeds: int, rollouts: int | None) -> list[str]:
    """Return the recipes without results for the current settings."""
    there = {(row["recipe"], row["seed"], row["mark"]) for row in found["runs"]}
    return [
        name
        for name in names
        if any((name, seed, mark(fitted(name, seed, rollouts))) not in there for seed in range(seeds))
    ]


def due_betas(found: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the runs over beta without results for the current settings."""
    there = {(row["penalty"], row["beta"], row["mark"]) for row in found["beta"]}
    wanted = [(penalty, beta) for penalty in PENALTIES for beta in BETAS]
    return [w for w in wanted if (*w, mark(fitted("rloo", 0, BETA_ROLLOUTS, penalised(*w)))) not in there]


def main() -> None:
    """Run what is missing, and write the documentation of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="all when left out")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    parser.add_argument("--rollouts", type=int, help="of each run; as benchmarks.fits says when left out")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--beta", action="store_true", help="the runs over beta instead of those over recipes")
    parser.add_argument("--page", action="store_true", help="no run, only the documentation")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # faster than several at this size
    found = results(options.json)
    for penalty, beta in due_betas(found) if options.beta else ():
        row = run_beta(penalty, beta)
        keep_beta(row, options.json)
        print(f"{penalty} beta {beta}: KL {row['kl']:.3f}, right {row['right'][1]:.3f}", flush=True)
    names = [] if options.beta or options.page else options.recipes or list(RECIPES)
    for name in due(found, names, options.seeds, options.rollouts):
        rows = []
        for seed in range(options.seeds):
            rows.append(run(name, seed, options.rollouts))
            right = " -> ".join(f"{x:.3f}" for x in rows[-1]["right"])
            print(
                f"{name} seed {seed}: right {right}, KL {rows[-1]['kl']:.2f}, {rows[-1]['seconds']:.0f} s", flush=True
            )
        keep_recipe(name, rows, options.json)
    if options.page or options.json == RESULTS:
        from benchmarks.pages import write_page

        write_page(results(options.json), DOCS)


if __name__ == "__main__":
    main()
