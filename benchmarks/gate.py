"""Processor time of the commit that is checked out next to that of the commit in benchmarks/baseline.

`python -m benchmarks.gate [--rounds 6] [--against COMMIT]`: both commits are installed into folders of their own, and train
each recipe in turn, in fresh processes on one thread, in changing order. A figure is the least time of this commit over the
least of the other, with the 95 % interval of a bootstrap over the rounds. The command fails where a whole interval is above
`LIMIT`: find what became slower, or, if that is wanted, write the new commit to benchmarks/baseline.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASELINE = Path(__file__).parent / "baseline"
LIMIT = 1.05
STEPS = 12
RECIPES = {"quickstart": "a turn", "guessing": "several turns"}
RUN = """
import json, sys, time
from transformers import TrainerCallback
from hf_rlhf import RLHFTrainer, load_recipe

class Clock(TrainerCallback):
    def __init__(self): self.at = []
    def on_step_begin(self, *_, **__): self.at.append(time.process_time())
    def on_train_end(self, *_, **__): self.at.append(time.process_time())

name, steps, folder = sys.argv[1:]
recipe = load_recipe(name, [f"training.max_steps={steps}"])
RLHFTrainer(None, recipe, recipe.training_arguments(folder), callbacks=[clock := Clock()]).train()
took = [b - a for a, b in zip(clock.at, clock.at[1:])]
print(min(took[1:]))
"""
"""The program of both, by names that do not move: processor seconds of the shortest step but the first."""


def install(commit: str, folder: Path) -> Path:
    """Install a commit into a folder that goes before the installed package."""
    source = folder / "source"
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        raise SystemExit(
            f"{commit} must be a commit of this repository (benchmarks/baseline): {packed.stderr.decode()}"
        )
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
        files.extractall(source, filter="data")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "installed"), str(source)], check=True)
    return folder / "installed"


def measure(installed: Path, recipe: str) -> dict[str, float]:
    """Return the processor seconds of a command that trains for a step, and of a step, each in a fresh process."""
    own = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *words, f"{folder}/run"]
            done = subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{recipe} failed in {installed}:\n{done.stderr}")
        return done.stdout

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run("-m", "hf_rlhf", "train", recipe, "--max-steps", "1", "--output-dir")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command of one step": command, "step": float(run("-c", RUN, recipe, str(STEPS)).splitlines()[-1])}


def ratio(now: Sequence[float], before: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Return least over least, and its 95 % interval over rounds drawn with replacement."""
    draw, count = random.Random(0), len(now)
    found = []
    for _ in range(draws):
        rounds = draw.choices(range(count), k=count)
        found.append(min(now[i] for i in rounds) / min(before[i] for i in rounds))
    found.sort()
    return min(now) / min(before), found[int(0.025 * draws)], found[int(0.975 * draws)]


def compare(baseline: Path, current: Path, rounds: int) -> list[str]:
    """Print a line for each figure, and return those that are slower."""
    seconds: dict[tuple[str, str], dict[Path, list[float]]] = {}
    for number in range(rounds):
        for recipe in RECIPES:
            for tree in (baseline, current)[:: 1 if number % 2 else -1]:
                for name, took in measure(tree, recipe).items():
                    seconds.setdefault((recipe, name), {baseline: [], current: []})[tree].append(took)
    slower = []
    for (recipe, name), found in seconds.items():
        least, low, high = ratio(found[current], found[baseline])
        line = f"{recipe} ({RECIPES[recipe]}), {name}: {least:.3f} ({low:.3f} to {high:.3f})"
        print(f"{line} of {1000 * min(found[baseline]):.0f} ms")
        slower += [line] if low > LIMIT else []
    return slower


def main() -> None:
    """Measure, print, and fail where something became slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--against", default=BASELINE.read_text(encoding="utf-8").strip(), metavar="COMMIT")
    chosen = parser.parse_args()
    if chosen.rounds < 3:
        parser.error(f"--rounds must be at least 3, got {chosen.rounds}: an interval needs a spread")
    with tempfile.TemporaryDirectory() as folder:
        trees = [install(commit, Path(folder) / name) for name, commit in (("before", chosen.against), ("now", "HEAD"))]
        slower = compare(trees[0], trees[1], chosen.rounds)
    if slower:
        raise SystemExit(f"slower than {chosen.against} by more than {LIMIT - 1:.0%}:\n" + "\n".join(slower))


if __name__ == "__main__":
    main()
