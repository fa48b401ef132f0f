"""Guards of the trainer, from Python as from the command line: the folder, signals, weights and state that cannot be saved."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_rlhf.axes import RewardSource
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.errors import CheckpointError, RunExists, UserError
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.runtime.run_folder import only_run_in
from hf_rlhf.runtime.signals import StoppedError
from tests.helpers import offline_runs as off
from tests.helpers.runs import parameters, trainer

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}


def offline(folder: Path, *words: str) -> Any:
    """A reward model's trainer, four steps with checkpoints at 2 and 4."""
    from hf_rlhf.training.offline.setup import make_trainer

    saving = [f"training.{name}={x}" for name, x in STEPS.items()]
    return make_trainer(off.recipe(folder.parent / "rows", "reward_model", *saving, *words), str(folder))


def rollouts(folder: Path, **training: Any) -> Any:
    return trainer(folder, training={**STEPS, **training})


KINDS = pytest.mark.parametrize("make", [rollouts, offline], ids=["rollouts", "offline"])


# The folder


@KINDS
def test_a_disk_without_room_for_a_checkpoint_is_refused_before_anything_is_written(make, tmp_path, monkeypatch):
    runs = [make(tmp_path / f"out{i}") for i in range(2)]
    sizes = runs[0]._sizes()
    assert sizes["optimizer"] == pytest.approx(2 * sizes["gradients"])  # AdamW's two moments
    room = sum(sizes.values()) * MIB

    def free(count: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=count))

    free(room - 1)
    with pytest.raises(UserError, match=r"no space left for a checkpoint in .*out0: it takes at least trained weights"):
        runs[0].train()
    assert not (tmp_path / "out0" / "recipe.yaml").exists()
    free(room)
    runs[1].train()
    assert (tmp_path / "out1" / "checkpoint-4").exists()


@KINDS
def test_another_run_in_the_folder_is_refused_unless_it_is_resumed_or_overwritten(make, tmp_path):
    first, second, third = (make(tmp_path / "out") for _ in range(3))
    first.train()
    with pytest.raises(RunExists, match=r"already contains a run.*resume_from_checkpoint.*overwrite"):
        second.train()
    second.train(resume_from_checkpoint=True)
    third.train(overwrite=True)
    manifests = [checkpoint_manifest.verify(tmp_path / "out" / f"checkpoint-{n}") for n in (2, 4)]
    assert [manifest["run_id"] for manifest in manifests] == 2 * [third.run_id]
    assert first.run_id == second.run_id != third.run_id


@KINDS
def test_what_another_process_is_still_writing_is_hashed_when_it_is_complete(make, tmp_path, monkeypatch):
    made = make(tmp_path / "out")
    kept, theirs = made._optimizer_state, [f"checkpoint-2/{name}" for name in ("rlhf_state_1.pt", "rng_state_1.pth")]

    def optimizer_state() -> Any:
        for name in theirs:
            torch.save({}, tmp_path / "out" / name)
            monkeypatch.setattr(made.accelerator, "wait_for_everyone", complete)
        return kept()

    def complete() -> None:
        while theirs:
            torch.save({"whole": 1}, tmp_path / "out" / theirs.pop())

    monkeypatch.setattr(made, "_optimizer_state", optimizer_state)
    made.args.max_steps = 2
    made.train()
    files = checkpoint_manifest.verify(tmp_path / "out" / "checkpoint-2")["files"]
    assert {"rlhf_state_1.pt", "rng_state_1.pth"} <= set(files)
    assert not theirs


class Borders(TrainerCallback):
    """Note which checkpoints count when a step begins."""

    def __init__(self, folder: Path):
        self.folder, self.began, self.counted = folder, threading.Event(), {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sealed = self.folder.glob(f"checkpoint-*/{checkpoint_manifest.MANIFEST}")
        self.counted[state.global_step] = sorted(path.parent.name for path in sealed)
        if state.global_step == 2:
            self.began.set()


@KINDS
def test_the_next_step_runs_while_a_checkpoint_is_sealed_and_the_next_checkpoint_waits(make, tmp_path, monkeypatch):
    made, seal, events = make(tmp_path / "out"), checkpoint_manifest.seal, []
    made.add_callback(borders := Borders(tmp_path / "out"))
    whole = checkpoint_manifest.written_whole

    def waits(folder: Path, facts: dict[str, Any]) -> None:
        assert borders.began.wait(60), "the step waited for the checkpoint"
        seal(folder, facts)
        events.append(f"sealed {folder.name}")

    def written(folder: Path, args: Any) -> Any:
        events.append(f"written {folder.name}")
        return whole(folder, args)

    monkeypatch.setattr(checkpoint_manifest, "seal", waits)
    monkeypatch.setattr(checkpoint_manifest, "written_whole", written)
    made.train()
    assert borders.counted[2] == []
    assert events == [f"{done} checkpoint-{step}" for step in (2, 4) for done in ("written", "sealed")]
    assert made.finish_checkpoint() is None, "train leaves nothing to wait for"
    assert checkpoint_manifest.newest(tmp_path / "out").name == "checkpoint-4"


def test_a_callback_that_may_read_a_checkpoint_finds_it_sealed(tmp_path):
    class Reads(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            checkpoint_manifest.verify(tmp_path / f"checkpoint-{state.global_step}")

    made = rollouts(tmp_path)
    made.add_callback(Reads())
    made.train()


def test_a_checkpoint_that_cannot_be_sealed_ends_the_run_after_a_step_and_is_not_resumed(tmp_path, monkeypatch):
    straight = rollouts(tmp_path / "straight")
    straight.train()
    made = rollouts(tmp_path / "out")

    def fails(folder: Path, facts: dict[str, Any]) -> None:
        monkeypatch.undo()
        raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoint_manifest, "seal", fails)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        made.train()
    assert any("is whole" in note for note in caught.value.__notes__)
    again = rollouts(tmp_path / "out")
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again.model), parameters(straight.model))


def test_overwriting_deletes_the_checkpoints_of_the_other_run_and_nothing_else(tmp_path):
    rollouts(tmp_path).train()
    (tmp_path / "notes.txt").write_text("mine")
    made = rollouts(tmp_path, save_strategy="no", max_steps=1)
    made.train(overwrite=True)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        rollouts(tmp_path).train(resume_from_checkpoint=True)


def test_an_evaluation_before_training_is_no_other_run_and_one_into_another_run_is(tmp_path):
    from tests.helpers.runs import problems

    made = trainer(tmp_path, eval_data=problems(2), training=STEPS)
    made.evaluate()
    made.train()
    made.train()  # goes on in the same folder
    other = trainer(tmp_path, eval_data=problems(2), training=STEPS)
    other.evaluate()
    with pytest.raises(RunExists):
        other.train()


@KINDS
def test_a_folder_in_which_another_thread_or_process_trains_is_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_rlhf.runtime.run_folder.PATIENCE_S", 0.1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with only_run_in(tmp_path / "out"):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    made = make(tmp_path / "out")
    try:
        with pytest.raises(UserError, match="another run is writing into"):
            made.train()
    finally:
        done.set()
        thread.join()
    made.train()


# Signals


@dataclass
class Sends(TrainerCallback):
    """Sends this process a signal at an event of a step."""

    number: int
    step: int = 1
    event: str = "on_step_begin"
    handlers: list[Any] = field(default_factory=list)

    def _at(self, event: str, state: Any) -> None:
        if event == self.event and state.global_step == self.step:
            self.handlers.append(signal.getsignal(self.number))
            os.kill(os.getpid(), self.number)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at("on_step_begin", state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at("on_train_end", state)


@KINDS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_train_at_the_steps_border_with_a_checkpoint_that_resumes_bit_identically(make, number, tmp_path):
    straight = make(tmp_path / "straight")
    straight.train()
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        made = make(tmp_path / "out")
        made.add_callback(Sends(number, step=2))
        with pytest.raises(StoppedError, match=f"stopped by {number.name} after step 3") as error:
            made.train()
        assert error.value.code == 128 + number
        assert all(signal.getsignal(n) is signal.default_int_handler for n in before)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert checkpoint_manifest.newest(tmp_path / "out").name == "checkpoint-3"
    again = make(tmp_path / "out")
    again.train(resume_from_checkpoint=True)
    pairs = zip(straight.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_signal_after_the_last_step_leaves_a_checkpoint_too(tmp_path):
    made = rollouts(tmp_path, save_strategy="no")
    made.add_callback(Sends(signal.SIGTERM, step=4, event="on_train_end"))
    with pytest.raises(StoppedError, match="stopped by SIGTERM after step 4"):
        made.train()
    assert checkpoint_manifest.newest(tmp_path).name == "checkpoint-4"
    again = rollouts(tmp_path)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert torch.equal(parameters(made), parameters(again))


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        made = rollouts(tmp_path)
        made.add_callback(Sends(signal.SIGHUP))
        assert made.train().global_step == 4
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_than_the_main_one_trains_without_touching_handlers(tmp_path):
    before, found = signal.getsignal(signal.SIGTERM), []
    made = rollouts(tmp_path)
    thread = threading.Thread(target=lambda: found.append((made.train().global_step, signal.getsignal(signal.SIGTERM))))
    thread.start()
    thread.join()
    assert found == [(4, before)]


def test_handlers_are_put_back_after_an_error(tmp_path):
    def fails(completions: list[str]) -> list[float]:
        raise ValueError("no")

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    made = trainer(tmp_path, rewards=[{"use": "function", "function": fails, "on_error": "raise"}])
    with pytest.raises(Exception, match="no"):
        made.train()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


# Weights


class Spoils(TrainerCallback):
    """Puts one wrong number into a parameter after a step."""

    def __init__(self, module: Any, name: str, number: float, step: int = 3):
        self.parameter, self.number, self.step = dict(module.named_parameters())[name], number, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.parameter.data.view(-1)[-1] = self.number


@KINDS
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_not_sealed(make, number, tmp_path):
    made = make(tmp_path / "out")
    name = next(name for name, p in made.model.named_parameters() if "down_proj" in name and p.requires_grad)
    made.add_callback(Spoils(made.model, name, number, step=4))
    with pytest.raises(FloatingPointError, match=rf"got an infinity or a NaN in policy\.{name} at step 4"):
        made.train()
    assert checkpoint_manifest.newest(tmp_path / "out").name == "checkpoint-2"
    with pytest.raises(FloatingPointError, match="down_proj"):
        made.save_model()
    again = make(tmp_path / "out")
    assert again.train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"advantages": "gae", "critic": "separate"}, r"critic\."),
        ({"kl": [{"use": "in_loss"}], "reference": {"use": "ema", "decay": 0.5}}, r"reference\."),
        ({"update": {"mini_batches": 2, "ema": 0.5}}, r"ema\."),
        ({"lora": True}, r"policy\..*lora_"),
    ],
    ids=["critic", "reference", "average", "adapter"],
)
def test_so_are_those_that_a_checkpoint_holds_beside_the_policys(parts, named, tmp_path):
    made = trainer(tmp_path, training=STEPS, **parts)
    made.train()
    if "critic" in named:
        tensor = next(made.actor_critic.critic.parameters())
    elif "reference" in named:
        tensor = next(made.collector.forwards.references.moving()["reference"][1].parameters())
    elif "ema" in named:
        tensor = made.ema.tensors()[0]
    else:
        tensor = next(p for p in made.model.parameters() if p.requires_grad)
    tensor.data.view(-1)[0] = float("inf")
    with pytest.raises(FloatingPointError, match=f"in {named}"):
        made._save_checkpoint(made.model_wrapped, None)


# State


@dataclass(kw_only=True)
class Keeps(RewardSource):
    """A reward by length whose state holds what a test gives it."""

    name = "keeps"

    def __post_init__(self) -> None:
        self.kept: Any = None

    def __call__(self, rollouts: Any) -> list[float]:
        return [0.1 * len(text) for text in rollouts.completions]

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state["kept"]


def keeping(folder: Path, value: Any, **training: Any) -> tuple[Any, Keeps]:
    plugin = Keeps()
    made = trainer(folder, rewards=[plugin], training={**STEPS, **training})
    plugin.kept = value
    return made, plugin


@pytest.mark.parametrize("value", [np.arange(2), deque([1]), np.float32(1), object()], ids=lambda x: type(x).__name__)
def test_state_that_could_not_be_loaded_is_refused_at_the_first_save_naming_plugin_and_key(value, tmp_path):
    made, _ = keeping(tmp_path, value)
    with pytest.raises(
        CheckpointError, match=rf"rewards\.0=keeps: state_dict\(\)\['kept'\] must .*{type(value).__name__}"
    ):
        made.train()
    assert made.state.global_step == 2
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_number_of_numpy_comes_back_as_pythons(tmp_path):
    keeping(tmp_path, {"mean": np.float64(0.5)})[0].train()
    again, plugin = keeping(tmp_path, None, max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert plugin.kept == {"mean": 0.5}
    assert type(plugin.kept["mean"]) is float
