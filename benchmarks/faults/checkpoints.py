"""Rows 35 to 43: full disks, damaged checkpoints, other settings, signals, and two runs in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from benchmarks.faults.world import CannotRun, World, expect, fault

SMALL_DISK = 'mkdir -p out && mount -t tmpfs -o size={size}k none out && "$@"; code=$?; cp -r out copy; exit $code'
"""A shell command that runs its arguments with a small file system at `out`, and copies what they leave there."""


def finished(world: World) -> Path:
    """Train 6 steps with a checkpoint after each second one, and return the last checkpoint."""
    world.recipe()
    world.train().well()
    return world.folder / "out" / "checkpoint-6"


def resumed(world: World, expected: str) -> str:
    """Resume, check that the weights are as expected, and return what was printed."""
    (world.folder / "out" / "model.safetensors").unlink(missing_ok=True)
    run = world.train("--resume").well()
    expect(world.weights() == expected, "the weights differ from those of a quiet run")
    return run.text


def filled(world: World) -> tuple[str, str]:
    """Fill the disk while the second checkpoint is saved, make room, and resume. Returns a line of each."""
    last = finished(world)
    expected, size = world.weights(), sum(path.stat().st_size for path in last.iterdir()) // 1024
    world.recipe()
    program = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        SMALL_DISK.format(size=int(1.6 * size)),
        "sh",
        sys.executable,
        "-m",
        "hf_rlhf",
    ]
    run = world.run("train", "recipe.yaml", "--output-dir", "out", program=program)
    if "unshare failed" in run.text or "mount:" in run.text:
        raise CannotRun("no file system can be mounted: run it as root, or where users may have namespaces")
    line = run.stopped().line("o space left on")
    (world.folder / "copy").rename(world.folder / "out")
    resumed(world, expected)
    return line, f"resumed from {world.checkpoints()[0]}, the weights of a quiet run"


@fault(
    35, "disk full while saving", "keep the last good checkpoint, say what is full", trl="dies and leaves a part of one"
)
def _(world: World) -> str:
    return filled(world)[0]


@fault(36, "resuming after a full disk", "go on from the newest whole checkpoint", trl="FileNotFoundError")
def _(world: World) -> str:
    return filled(world)[1]


def passed_over(world: World, names: list[str], damage: object) -> str:
    """Damage a file of the newest checkpoint, and resume from the one before. Returns the last message."""
    line = ""
    for name in names:
        path = finished(world) / name
        expected = world.weights()
        damage(path)  # type: ignore[operator]
        said = resumed(world, expected)
        found = [line for line in said.splitlines() if name in line]
        expect(found, f"nothing was said of {name}:\n{said[-2000:]}")
        line = found[0]
    return line


@fault(37, "truncated files in a checkpoint", "go on from the one before, exactly", trl="raises")
def _(world: World) -> str:
    names = ["model.safetensors", "optimizer.pt", "trainer_state.json", "rlhf_state_0.pt"]
    return passed_over(world, names, lambda path: os.truncate(path, path.stat().st_size // 2))


@fault(38, "one bit of the weights has changed", "go on from the checkpoint before", trl="trains on")
def _(world: World) -> str:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return passed_over(world, ["model.safetensors", "rlhf_manifest.json"], flip)


@fault(39, "missing files in a checkpoint", "go on from the one before", trl="resumes to other weights")
def _(world: World) -> str:
    return passed_over(world, ["optimizer.pt", "rng_state.pth", "scheduler.pt", "rlhf_manifest.json"], Path.unlink)


@fault(40, "other settings on resume", "refuse, with the difference", trl="accepts them")
def _(world: World) -> str:
    finished(world)
    (world.folder / "out" / "summary.json").unlink()
    line = ""
    for change in (
        "training.learning_rate=0.02",
        "training.seed=7",
        "rollout.num_generations=2",
        "advantages=leave_one_out",
    ):
        line = (
            world.train("--resume", change)
            .refused()
            .line(change.split("=")[0].removeprefix("training."), "in the checkpoint")
        )
    return line


def stopped_by(world: World, number: int) -> str:
    """Send a signal after the first step, and resume."""
    words = ["training.save_strategy=no", "training.max_steps=80"]
    world.train(*words, out="straight").well()
    expected = world.weights("straight")
    process = world.begin("train", "recipe.yaml", "--output-dir", "out", *words)
    world.wait(process, lambda: world.entries())
    os.kill(process.pid, number)
    run = world.end(process)
    if run.code == 0:
        raise CannotRun("the run was over before the signal came")
    expect(run.code == 128 + number, f"exit code {run.code}:\n{run.text[-2000:]}")
    line = run.line(f"stopped by {signal.Signals(number).name}")
    (world.folder / "out" / "model.safetensors").unlink(missing_ok=True)
    world.train("--resume", *words).well()
    expect(world.weights() == expected, "the weights differ from those of a quiet run")
    return line


@fault(41, "SIGTERM", "save after the step, resume exactly", trl="dies unsaved, or resumes to other weights")
def _(world: World) -> str:
    return stopped_by(world, signal.SIGTERM)


@fault(42, "SIGINT", "save after the step, resume exactly", trl="dies unsaved")
def _(world: World) -> str:
    return stopped_by(world, signal.SIGINT)


@fault(43, "two runs in one folder", "refuse the second", trl="the second overwrites the first")
def _(world: World) -> str:
    first = world.begin("train", "recipe.yaml", "--output-dir", "out", "training.max_steps=100000")
    world.wait(first, lambda: world.entries())
    lines = [world.train(*words).refused().line("error:") for words in ([], ["--resume"])]
    expect(first.poll() is None, "the first run ended")
    first.kill()
    world.end(first)
    shutil.rmtree(world.folder / "out")
    return lines[0]
