"""A long run with everything that goes wrong, against a quiet one: equal weights, constant memory.

`python -m benchmarks.soak [--steps 2000] [--kills 20] [--full 2]`

The reward fails on 1% of the rows in both runs. The quiet run is watched: its memory, descriptors, threads and child processes
after a tenth of the steps and at the end. The other one is killed with SIGKILL at random moments and resumed, its disk is
filled and emptied, and Weights & Biases comes and goes: offline, out of reach, not asked for, silent in the middle of a run.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.faults.trackers import silent_later
from benchmarks.faults.world import Failed, World, expect

REWARD = """
import hashlib

def score(completions):
    (completion,) = completions
    if int(hashlib.sha256(completion.encode()).hexdigest(), 16) % 100 == 0:
        raise ValueError("one row in a hundred")
    return [len(set(completion)) / 8]
"""
Tracker = tuple[str, dict[str, str]]
NONE: Tracker = ("none", {})
OFFLINE: Tracker = ("wandb", {"WANDB_MODE": "offline"})


def online(address: str) -> Tracker:
    """Return a tracker whose server is at an address."""
    return "wandb", {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}


MOUNTED = "HF_RLHF_SOAK"
"""Set where this program runs with a file system of its own at the folder that it names."""


def watched(pid: int) -> dict[str, int]:
    """Return what a process holds: resident memory in KiB, descriptors, threads, children."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {
        "memory": int(status["VmRSS"].split()[0]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "children": len(children),
    }


def last_step(world: World, out: str) -> int:
    """Return the newest logged step of a run."""
    path = world.folder / out / "metrics.jsonl"
    return path.read_bytes().count(b'"learning_rate"') if path.exists() else 0


def quiet(world: World, steps: int) -> tuple[str, dict[str, int], dict[str, int]]:
    """Train without a fault but those of the reward. Returns the weights, and what the process held early and late."""
    process = world.begin("train", "recipe.yaml", "--output-dir", "quiet")
    seen = []
    for share in (0.1, 0.97):
        world.wait(process, lambda share=share: last_step(world, "quiet") >= share * steps, seconds=3600)
        looks = []
        for _ in range(20):  # a file that is being written is open in some of them
            looks.append(watched(process.pid))
            time.sleep(0.01)
        seen.append({name: min(look[name] for look in looks) for name in looks[0]})
    world.end(process, 3600).well()
    return world.weights("quiet"), seen[0], seen[1]


def begin(world: World, tracking: Tracker) -> Any:
    """Start the run, or continue it, with a tracker."""
    tracker, environment = tracking
    resume = ["--resume"] if world.checkpoints() else []
    if not resume and (world.folder / "out").exists():
        resume = ["--overwrite"]
    words = ["train", "recipe.yaml", "--output-dir", "out", *resume, "--report_to", tracker]
    return world.begin(*words, **environment)


def disturbed(world: World, steps: int, kills: int, full: int, draw: random.Random) -> dict[str, int]:
    """Train to the end through kills and full disks. Returns how often each happened."""
    counts = {"kills": 0, "full disks": 0}
    stops = sorted(draw.sample(range(steps // 50, steps - steps // 50), kills + full))
    kinds = ["kill"] * kills + ["full"] * full
    draw.shuffle(kinds)
    ballast = world.folder / "ballast"
    for number, (stop, kind) in enumerate(zip(stops, kinds, strict=True)):
        with silent_later() if number % 4 == 3 else nullcontext("http://127.0.0.1:9") as address:
            process = begin(world, (NONE, OFFLINE, online(address), online(address))[number % 4])
            world.wait(process, lambda stop=stop: last_step(world, "out") >= stop, seconds=3600)
            if kind == "kill":
                time.sleep(draw.random() * 0.2)
                process.kill()
                world.end(process)
                counts["kills"] += 1
                continue
            fill(ballast)
            run = world.end(process)
            ballast.unlink()
            expect(run.code not in (0, None), "a full disk was not noticed")
            run.line("o space left on")
            counts["full disks"] += 1
    world.end(begin(world, NONE), 3600).well()
    return counts


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return


def soak(folder: Path, steps: int, kills: int, full: int, seed: int) -> str:
    """Run both and compare. Returns what was seen. Raises `Failed`."""
    world = World(folder)
    world.write("reward.py", REWARD)
    training = {"max_steps": steps, "save_steps": max(steps // 200, 2), "save_total_limit": 3}
    rewards = [{"use": "function", "function": "reward.py:score", "rowwise": True}]
    world.recipe(rewards=rewards, training=training)
    try:
        expected, early, late = quiet(world, steps)
        counts = disturbed(world, steps, kills, full, random.Random(seed))
        expect(world.weights() == expected, f"other weights after {counts}")
        growth = late["memory"] / early["memory"] - 1
        expect(growth < 0.02, f"memory grew by {growth:.1%}")
        for name in ("descriptors", "threads", "children"):
            expect(early[name] == late[name], f"{name}: {early[name]}, then {late[name]}")
    finally:
        world.close()
    happened = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{steps} steps, {happened}: the weights of the quiet run; memory {growth:+.2%}, {late}"


def main() -> int:
    """Run on a small file system of its own, which can be filled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--full", type=int, default=2, help="how often the disk is full")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = os.environ.get(MOUNTED)
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            os.environ[MOUNTED] = made
            mount = f'mount -t tmpfs -o size=96m none {made} && exec "$@"'
            command = [
                "unshare",
                "-rm",
                "sh",
                "-c",
                mount,
                "sh",
                sys.executable,
                "-m",
                "benchmarks.soak",
                *sys.argv[1:],
            ]
            return os.spawnvp(os.P_WAIT, command[0], command)
    try:
        print(soak(Path(folder), asked.steps, asked.kills, asked.full, asked.seed))
    except Failed as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
