"""Processes of a run that are killed or stand still: the others end soon and name them, and the run resumes to the bit."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.paths import environment
from tests.helpers.processes import ranks, warm
from tests.helpers.waits import scaled

CODE = """
import json, os, torch
from transformers import TrainerCallback
from hf_rlhf.runtime import activity
from tests.helpers import stepping
spec, phase, step, number, lost, resume = json.loads({given!r})
rank = int(os.environ["RANK"])
class Ends(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if rank in lost and self.end not in activity.listeners:
            activity.listeners.append(self.end)
    def end(self):
        if trainer.state.global_step >= step and activity.current()[-1].name == phase:
            os.kill(os.getpid(), number)
trainer = stepping.make_trainer(spec, [Ends()])
trainer.train(resume_from_checkpoint=resume or None)
torch.save(stepping.parameters(trainer), spec["output_dir"] + f"/{{rank}}.pt")
trainer.close()
"""
WITHIN = 30.0
"""Seconds in which the others end."""


def specification(folder: Path, patience: int = 60) -> dict[str, Any]:
    algorithm = {
        "rollout": {"use": "generate", "prompts": 4, "num_generations": 4, "max_new_tokens": 6},
        "rewards": [{"use": "format", "pattern": ".*[a-f].*"}],
        "advantages": "reinforce",
    }
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "ddp_timeout": patience}
    return {
        "algorithm": algorithm,
        "update": {"mini_batches": 2, "epochs": 1},
        "training": {"max_steps": 10, "optim": "adamw_torch", **saving},
        "output_dir": str(folder),
    }


def run(
    spec: dict[str, Any], lost: Any = (), phase: str = "", step: int = 0, number: int = 9, resume: bool = False
) -> Any:
    """Run two processes. Returns (exit code, what it printed, seconds after the first one ended) of each."""
    words = [*warm("-c"), CODE.format(given=json.dumps([spec, phase, step, number, list(lost), resume]))]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(words, env=environment(**own), stdout=pipe, stderr=pipe, text=True) for own in ranks()]
    ends: dict[int, float] = {}
    try:
        limit = time.monotonic() + scaled(120)
        stopped = lost if number == signal.SIGSTOP else ()
        while len(ends) < len(started) - len(stopped):
            assert time.monotonic() < limit, "a process did not end"
            ends |= {i: time.monotonic() for i, x in enumerate(started) if i not in ends and x.poll() is not None}
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
    said = [process.communicate()[1] for process in started]
    return [(x.returncode, said[i], ends.get(i, 0.0) - min(ends.values())) for i, x in enumerate(started)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("straight")
    assert [code for code, _, _ in run(specification(folder))] == [0, 0]
    return torch.load(folder / "0.pt", weights_only=True)


MOMENTS = [
    (phase, lost, step)
    for phase in ("rollout", "rewards", "update", "saving")
    for lost, step in (([1], 3), ([0], 3), ([0, 1], 5), ([1], 6), ([0], 7))
]


@pytest.mark.parametrize(
    ("phase", "lost", "step"),
    [pytest.param(*x, marks=() if x == ("update", [1], 3) else pytest.mark.slow) for x in MOMENTS],
    ids=str,
)
def test_a_killed_process_ends_the_others_which_name_it_and_the_run_resumes_to_the_bit(
    phase, lost, step, straight, tmp_path
):
    found = run(specification(tmp_path), lost, phase, step)
    for rank, (code, said, seconds) in enumerate(found):
        if rank in lost:
            assert code == -signal.SIGKILL
            continue
        assert code == 1
        assert seconds < WITHIN
        assert re.search(
            rf"LostProcess: process {lost[0]} does not answer; it was last seen in [^;]*{phase}.* of step ", said
        )
        assert "checkpoint-" in said.rpartition("LostProcess")[2], "it says where the run goes on"
    assert [code for code, _, _ in run(specification(tmp_path), resume=True)] == [0, 0]
    assert torch.equal(torch.load(tmp_path / "0.pt", weights_only=True), straight)
    assert not (tmp_path / "_processes").exists()


def test_a_process_that_stands_still_ends_the_others_after_ddp_timeout(tmp_path):
    found = run(specification(tmp_path, patience=4), [1], "rewards", 3, int(signal.SIGSTOP))
    code, said, _ = found[0]
    assert code == 1
    assert re.search("LostProcess: process 1 does not answer; it was last seen in [^;]*rewards.* of step ", said)
