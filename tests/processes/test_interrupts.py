"""A run that is asked to stop saves where it is and goes on from there; a folder has one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.run_folder import only_run_in
from hf_rlhf.runtime.signals import StopOnSignal, StoppedError
from tests.cli.test_cli_train import SMALL, begin, end, load
from tests.helpers.processes import ranks, run_ranks
from tests.helpers.waits import scaled, until


@pytest.fixture
def words(tmp_path: Path, tiny_model_path: Path) -> list[str]:
    rows = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(40)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["grpo", "--model", str(tiny_model_path), "--dataset", "problems.jsonl", *SMALL]
    given += ["--max-steps", "6", "--learning_rate", "0.01", "training.warmup_steps=0", "--save_strategy", "no"]
    return [*given, "update.mini_batches=2", "rewards=[{use: length, target: 3, maximum: 9}]"]


def first_step(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run has taken its first step."""
    metrics = folder / "metrics.jsonl"

    def taken() -> bool:
        assert process.poll() is None, process.communicate()
        return metrics.exists() and '"loss"' in metrics.read_text()

    until(taken, 120, pause=0.005)


def stopped(folder: Path, words: list[str], number: int, cwd: Path) -> subprocess.Popen[str]:
    """A run that got the signal after its first step."""
    process = begin(*words, "--output-dir", str(folder), cwd=cwd)
    first_step(folder, process)
    os.kill(process.pid, number)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_after_its_step_and_resuming_gives_equal_bits(number, words, tmp_path):
    end(begin(*words, "--output-dir", "straight", cwd=tmp_path))
    folder = tmp_path / "stopped"
    process = stopped(folder, words, number, tmp_path)
    _, errors = process.communicate(timeout=scaled(120))
    checkpoints = sorted(folder.glob("checkpoint-*"))
    if len(checkpoints) == 0:  # the run was over first
        pytest.skip("the run ended before the signal came")
    assert process.returncode == 128 + number
    step = checkpoints[-1].name.removeprefix("checkpoint-")
    assert f"stopped by {signal.Signals(number).name} after step {step}, with a checkpoint in {folder}" in errors
    assert "Traceback" not in errors
    assert not (folder / "summary.json").exists()
    end(begin(str(folder / "recipe.yaml"), "--resume", "--output-dir", str(folder), cwd=tmp_path))
    assert torch.equal(load(folder)[1], load(tmp_path / "straight")[1])


def test_processes_stop_after_the_same_step_though_one_alone_was_asked(words, tmp_path):
    words = [*words, "training.max_steps=400", "--output-dir", "two"]
    started = [begin(*words, cwd=tmp_path, **rank) for rank in ranks()]
    first_step(tmp_path / "two", started[0])
    os.kill(started[1].pid, signal.SIGTERM)
    said = [process.communicate(timeout=scaled(120))[1] for process in started]
    assert [process.returncode for process in started] == [143, 143], said
    (checkpoint,) = (tmp_path / "two").glob("checkpoint-*")
    assert all(f"after step {checkpoint.name.removeprefix('checkpoint-')}," in text for text in said)


def test_two_runs_do_not_share_a_folder(words, tmp_path):
    folder = tmp_path / "out"
    with only_run_in(folder):
        process = begin(*words, "--output-dir", str(folder), cwd=tmp_path)
        _, errors = process.communicate(timeout=scaled(120))
        assert process.returncode == 2
        assert f"another run is writing into {folder}" in errors
        with only_run_in(folder):  # its holder may enter again
            pass
    assert not folder.exists(), "neither wrote anything"
    end(begin(*words, "--output-dir", str(folder), "training.max_steps=1", cwd=tmp_path))


class Control:
    should_save = should_training_stop = False


def after_step(stop: StopOnSignal, control: Any) -> None:
    arguments = type("Arguments", (), {"world_size": 1, "device": torch.device("cpu")})
    stop.on_step_end(arguments, type("State", (), {"global_step": 7}), control)


def test_the_first_signal_is_noted_and_the_second_one_acts():
    given = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        the_second_one_acts()
    finally:
        signal.signal(signal.SIGINT, given)


def the_second_one_acts() -> None:
    before, control = signal.getsignal(signal.SIGINT), Control()
    with StopOnSignal() as stop:
        after_step(stop, control)
        assert not control.should_save
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        after_step(stop, control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(StoppedError, match="stopped by SIGINT after step 7") as error:
            stop.check(Path("out"))
        assert error.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


FAILS = """
from datetime import timedelta
from pathlib import Path
from transformers import TrainerCallback
from hf_rlhf.training import step_border
from tests.helpers.runs import SAMPLED, trainer

step_border.PATIENCE = timedelta(seconds=3)

class Fails(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index in {failing}:
            raise ValueError("the fault")

made = trainer(Path({folder!r}), rollout=SAMPLED, training={{"max_steps": 6}}, callbacks=[Fails()])
try:
    made.train()
except Exception as error:
    print("note:", *error.__notes__, flush=True)
    import os
    os._exit(0)
"""


def test_processes_that_all_fail_leave_a_checkpoint(tmp_path):
    said = run_ranks(FAILS.format(failing=[0, 1], folder=str(tmp_path)))
    assert all("checkpoint-3 is whole" in text for text in said)
    checkpoint_manifest.verify(tmp_path / "checkpoint-3")


def test_a_process_that_fails_alone_seals_nothing(tmp_path):
    said = run_ranks(FAILS.format(failing=[1], folder=str(tmp_path)))
    assert all("there is no checkpoint to resume from" in text for text in said)
    assert not [*tmp_path.glob("checkpoint-*")]
