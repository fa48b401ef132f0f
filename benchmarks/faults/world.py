"""A folder in which a fault is injected, with a tiny model and a dataset, and `hf-rlhf` in processes of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-m"]
"""Words that run a module as a program, in place of which a caller may put others."""
PLAIN = """
def score(completions):
    return [len(set(text)) / 8 for text in completions]
"""
"""A reward without faults."""
RECIPE: dict[str, Any] = {
    "model": {"path": "model"},
    "dataset": {"path": "problems.jsonl", "held_out": 0},
    "rollout": {"use": "generate", "prompts": 2, "num_generations": 4, "max_new_tokens": 6},
    "rewards": [{"use": "function", "function": "reward.py:score"}],
    "advantages": "group_norm",
    "reference": "none",
    "training": {
        "max_steps": 6,
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
    },
}


class Failed(AssertionError):
    """The product did not survive the fault as it must."""


class CannotRun(Exception):
    """The fault cannot be injected on this machine."""


@dataclass(frozen=True)
class Fault:
    """A row of the table: what hf_rlhf `must` do, and what TRL 1.16 does.

    `inject` gets a `World`, and returns what happened or raises `Failed` or `CannotRun`.
    """

    number: int
    title: str
    must: str
    trl: str
    inject: Callable[[World], str]


FAULTS: dict[int, Fault] = {}


def fault(
    number: int, title: str, must: str, *, trl: str
) -> Callable[[Callable[[World], str]], Callable[[World], str]]:
    """Enter a function into the table."""

    def enter(inject: Callable[[World], str]) -> Callable[[World], str]:
        FAULTS[number] = Fault(number, title, must, trl, inject)
        return inject

    return enter


def expect(condition: object, complaint: str) -> None:
    """Raise `Failed` unless the condition holds."""
    if not condition:
        raise Failed(complaint)


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code, what it printed, and the seconds that it took."""

    code: int
    text: str
    seconds: float

    def line(self, *words: str) -> str:
        """Return the first line with all these words. Raises `Failed` if there is none."""
        for line in self.text.splitlines():
            if all(word in line for word in words):
                return line.strip()
        raise Failed(f"no line has {', '.join(map(repr, words))} (exit code {self.code}):\n{self.text[-3000:]}")

    def well(self) -> Ended:
        """Return itself. Raises `Failed` unless the exit code is 0."""
        expect(self.code == 0, f"exit code {self.code} instead of 0:\n{self.text[-3000:]}")
        return self

    def stopped(self) -> Ended:
        """Return itself. Raises `Failed` unless it ended with an error, by an exit code of its own."""
        expect(self.code in (1, 2), f"exit code {self.code} instead of 1 or 2:\n{self.text[-3000:]}")
        return self

    def refused(self) -> Ended:
        """Return itself. Raises `Failed` unless it was refused before it ran: exit code 2, no traceback."""
        expect(self.code == 2, f"exit code {self.code} instead of 2:\n{self.text[-3000:]}")
        expect("Traceback" not in self.text, f"a traceback:\n{self.text[-3000:]}")
        return self


class World:
    """A folder with a tiny model, 8 problems and a recipe over them, and what runs there."""

    def __init__(self, folder: Path, program: list[str] | None = None, patience: float = 1.0) -> None:
        from hf_rlhf.testing import tiny_policy

        self.folder, self.program, self.patience = folder, program or PROGRAM, patience
        self.started: list[subprocess.Popen[str]] = []
        model, tokenizer = tiny_policy()
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        self.rows([{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)])
        self.recipe()
        self.write("reward.py", PLAIN)

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.started:
            process.kill()
            process.wait()

    def write(self, name: str, text: str) -> Path:
        """Write a file into the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """Replace the dataset."""
        self.write("problems.jsonl", "\n".join(map(json.dumps, rows)))

    def recipe(self, **parts: Any) -> None:
        """Begin afresh with the recipe, some sections replaced and the keys of `training` added."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        (self.folder / "calls").unlink(missing_ok=True)
        training = {**RECIPE["training"], **parts.pop("training", {})}
        self.write("recipe.yaml", json.dumps({**RECIPE, **parts, "training": training}))

    def reward(self, code: str, **settings: Any) -> None:
        """Give the recipe this file as its reward function."""
        self.write("reward.py", code)
        self.recipe(rewards=[{"use": "function", "function": "reward.py:score", **settings}])

    def begin(self, *words: str, program: list[str] | None = None, **environment: str) -> subprocess.Popen[str]:
        """Start `hf-rlhf WORDS`, or another program with these words."""
        env = {name: x for name, x in os.environ.items() if not name.startswith(("WANDB_", "HF_RLHF"))}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NETRC": str(self.folder / "netrc"), **environment}
        process = subprocess.Popen(
            [*(program or [*self.program, "hf_rlhf"]), *words],
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[str], seconds: float = 120.0) -> Ended:
        """Wait until a process ends. Raises `Failed` if it takes longer than `seconds`, times the patience."""
        started = time.monotonic()
        try:
            text, _ = process.communicate(timeout=seconds * self.patience)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            raise Failed(f"it did not end within {seconds * self.patience:.0f} s:\n{text[-3000:]}") from None
        return Ended(process.returncode, text, time.monotonic() - started)

    def run(self, *words: str, program: list[str] | None = None, **environment: str) -> Ended:
        """Run `hf-rlhf WORDS`, or another program with these words, to its end."""
        return self.end(self.begin(*words, program=program, **environment))

    def train(self, *words: str, out: str = "out", **environment: str) -> Ended:
        """Train by the recipe into the folder `out`."""
        return self.run("train", "recipe.yaml", "--output-dir", out, *words, **environment)

    def wait(self, process: subprocess.Popen[str], condition: Callable[[], object], seconds: float = 120.0) -> None:
        """Wait while a process runs until a condition holds. Raises `Failed` if it ends before that."""
        until = time.monotonic() + seconds * self.patience
        while not condition():
            if process.poll() is not None:
                raise Failed(f"it ended first:\n{self.end(process).text[-3000:]}")
            expect(time.monotonic() < until, "nothing happened")
            time.sleep(0.005)

    def entries(self, out: str = "out") -> list[dict[str, Any]]:
        """Return the logged entries of the optimizer steps of a run."""
        path = self.folder / out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if "health/nonfinite_step" in entry]

    def logged(self, name: str, out: str = "out") -> list[float]:
        """Return the values of a metric over a run."""
        return [entry[name] for entry in self.entries(out) if name in entry]

    def weights(self, out: str = "out") -> str:
        """Return the SHA-256 of the policy's weights in a folder."""
        return hashlib.sha256((self.folder / out / "model.safetensors").read_bytes()).hexdigest()

    def same_as_quiet(self, code: str, **settings: Any) -> None:
        """Check that a run with a reward ends with the weights of one with `PLAIN` under the same settings."""
        self.reward(PLAIN, **settings)
        self.train("--save_strategy", "no", out="quiet").well()
        self.reward(code, **settings)
        self.train("--save_strategy", "no").well()
        expect(self.weights() == self.weights("quiet"), "the weights differ from those of a quiet run")

    def checkpoints(self, out: str = "out") -> list[str]:
        """Return the names of the checkpoints, oldest first."""
        found = (self.folder / out).glob("checkpoint-*")
        return sorted((path.name for path in found), key=lambda name: int(name.split("-")[1]))
