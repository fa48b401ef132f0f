"""A run that fails leaves a checkpoint of the step before, from which it goes on as if nothing had happened."""

from __future__ import annotations

import gc
import random
import time
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import TrainerCallback

from hf_rlhf.scoring.scorer import RewardError
from hf_rlhf.training.offline.setup import make_trainer
from hf_rlhf_plugins.advantages.group_norm import GroupNorm
from hf_rlhf_plugins.policy_loss.ppo_clip import PPOClip
from hf_rlhf_plugins.rollout.generate import Generate
from tests.helpers import offline_runs as off
from tests.helpers.runs import SAMPLED, parameters, problems, trainer

STEPS = 8


class Fault:
    """When the next failure is due: after so many calls; None: never."""

    due: ClassVar[int | None] = None

    @classmethod
    def call(cls) -> None:
        random.random(), torch.rand(3)  # a failed step must leave no trace in the generators
        if cls.due is not None:
            cls.due -= 1
            if cls.due < 0:
                raise OSError("the fault")


@dataclass(kw_only=True)
class Estimator(GroupNorm):
    """Group norm that may fail, with a state that it changes in place."""

    name = "fragile_norm"

    def __post_init__(self) -> None:
        self.calls = torch.zeros(())

    def __call__(self, scored: Any) -> Any:
        self.calls += 1
        Fault.call()
        return super().__call__(scored) * (1 + self.calls.item() % 3)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.copy_(state["calls"])


@dataclass(kw_only=True)
class Engine(Generate):
    """Sampling that may fail."""

    name = "fragile_engine"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        Fault.call()
        return super().__call__(*args, **kwargs)


@dataclass(kw_only=True)
class Loss(PPOClip):
    """ppo_clip that may fail."""

    name = "fragile_clip"

    def __call__(self, *args: Any) -> Any:
        Fault.call()
        return super().__call__(*args)


def score(completions: list[str]) -> list[float]:
    Fault.call()
    return [len(set(text)) / 8 for text in completions]


REWARD = {"use": "function", "function": score, "on_error": "raise"}
PLAIN = {"use": "length", "target": 2, "maximum": 9}
PHASES: dict[str, Any] = {
    "rollout": lambda: {"rollout": Engine(prompts=2, num_generations=4, max_new_tokens=5)},
    "reward": lambda: {"rewards": [REWARD]},
    "advantages": lambda: {"advantages": Estimator()},
    "loss": lambda: {"policy_loss": Loss()},
    "loss with a critic": lambda: {"policy_loss": Loss(), "advantages": "gae", "critic": "value_head"},
}
"""The parts of a recipe that may fail, fresh for each run."""


class Callback(TrainerCallback):
    """Fails at an event."""

    def __init__(self, event: str) -> None:
        self.due = True
        setattr(self, event, self.fail)

    def fail(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 5 and self.due:
            raise ZeroDivisionError("the fault")


def run(folder: Any, callbacks: Any = None, training: Any = None, **parts: Any) -> Any:
    """A trainer of eight steps, two per rollout."""
    Fault.due = None
    settings = {"max_steps": STEPS, "save_strategy": "no", "optim": "adamw_torch", "learning_rate": 0.01}
    given = {"rollout": SAMPLED, "rewards": [PLAIN], **parts, "update": {"mini_batches": 2, "epochs": 1}}
    data = {"eval_data": problems(2)} if training else {}
    return trainer(folder, training={**settings, **(training or {})}, callbacks=callbacks, **data, **given)


def trained(made: Any, **options: Any) -> torch.Tensor:
    """The parameters after training."""
    try:
        made.train(**options)
        return parameters(made)
    finally:
        made.close()


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("phase", PHASES)
def test_a_failure_in_a_step_is_undone(phase, share, tmp_path):
    quiet = run(tmp_path / "quiet", **PHASES[phase]())
    Fault.due = 10**6
    straight, calls = trained(quiet), 10**6 - Fault.due
    made = run(tmp_path, **PHASES[phase]())
    Fault.due = int(calls * share)
    with pytest.raises(RewardError if phase == "reward" else OSError, match="the fault") as caught:
        trained(made)
    step = made.state.global_step
    assert 0 < step < STEPS
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{step}"
    assert any(f"checkpoint-{step} is whole" in note for note in caught.value.__notes__)
    assert torch.equal(trained(run(tmp_path, **PHASES[phase]()), resume_from_checkpoint=True), straight)


def rewards(made: Any) -> list[float]:
    """The logged mean rewards, each over several steps."""
    return [entry["reward/total/mean"] for entry in made.state.log_history if "reward/total/mean" in entry]


OFTEN = {"logging_steps": 5, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_evaluate", "on_log", "on_save"])
def test_a_callback_that_fails_between_two_updates_loses_nothing(event, tmp_path):
    quiet = run(tmp_path / "quiet", training=OFTEN)
    straight = trained(quiet)
    with pytest.raises(ZeroDivisionError):
        trained(run(tmp_path, [Callback(event)], OFTEN))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    made = run(tmp_path, training=OFTEN)
    assert torch.equal(trained(made, resume_from_checkpoint=True), straight)
    assert rewards(made) == rewards(quiet)


def test_once_an_update_has_begun_the_newest_checkpoint_is_named(tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        trained(run(tmp_path, [Callback("on_optimizer_step")], OFTEN | {"save_steps": 4}))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert any("checkpoint-4 is whole" in note for note in caught.value.__notes__)


def test_a_callback_that_fails_while_an_entry_is_logged_does_not_log_it_twice(tmp_path):
    often = {"logging_steps": 3, "save_strategy": "no", "max_steps": 9}
    quiet = run(tmp_path / "quiet", training=often)
    straight = trained(quiet)
    with pytest.raises(ZeroDivisionError):
        trained(run(tmp_path, [Callback("on_log")], often))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    made = run(tmp_path, training=often)
    assert torch.equal(trained(made, resume_from_checkpoint=True), straight)
    for name in ("step", "loss", "reward/total/mean", "policy/approx_kl"):
        own, other = ([entry.get(name) for entry in each.state.log_history[:3]] for each in (made, quiet))
        assert own == other


def test_the_border_of_the_last_step_is_not_saved_with_the_best_weights(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_strategy": "steps"}
    best |= {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}

    class Ends(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.global_step += 1  # a step without a checkpoint
            raise ZeroDivisionError("the fault")

    made = run(tmp_path, [Ends()], best | {"metric_for_best_model": "reward/total/mean"})
    with pytest.raises(ZeroDivisionError) as caught:
        trained(made)
    assert made.state.best_model_checkpoint is not None
    assert not (tmp_path / f"checkpoint-{STEPS + 1}").exists()
    assert any("is whole" in note for note in caught.value.__notes__)


def test_a_second_run_after_a_save_that_failed_leaves_a_checkpoint_too(tmp_path, monkeypatch):
    made = run(tmp_path, [Callback("on_step_begin")], {"save_strategy": "steps", "save_steps": 2})
    with monkeypatch.context() as patched:
        patched.setattr("hf_rlhf.training.sealing_trainer.save_state", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.train()
    made.args.save_strategy = "no"
    with pytest.raises(ZeroDivisionError, match="the fault"):
        made.train()
    made.close()
    assert (tmp_path / "checkpoint-5" / "rlhf_manifest.json").exists()


def test_a_run_without_rollouts_goes_on_too(tmp_path):
    off.save_model(tmp_path / "rows" / "model", attention_dropout=0.2)  # draws from the global generator

    def made(name: str, *callbacks: Any) -> Any:
        words = ["training.max_steps=8", "training.save_strategy=no", "training.per_device_train_batch_size=8"]
        words += ["model.dropout=true"]
        return make_trainer(off.recipe(tmp_path / "rows", "reward_model", *words), str(tmp_path / name), callbacks)

    straight = trained(made("quiet"))
    with pytest.raises(ZeroDivisionError):
        trained(made("failed", Callback("on_step_begin")))
    assert torch.equal(trained(made("failed"), resume_from_checkpoint=True), straight)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    made = run(tmp_path, **PHASES["rollout"]())
    Fault.due = 0
    with pytest.raises(OSError, match="the fault") as caught:
        trained(made)
    assert not [*tmp_path.glob("checkpoint-*")]
    assert "there is no checkpoint to resume from" in caught.value.__notes__


def test_sys_exit_in_a_callback_is_an_error_with_a_checkpoint(tmp_path):
    class Leaves(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise SystemExit(0)

    with pytest.raises(RuntimeError, match=r"sys\.exit\(0\)"):
        trained(run(tmp_path, [Leaves()]))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_keeping_a_border_takes_less_than_a_millisecond(tmp_path):
    made = run(tmp_path, advantages="gae", critic="value_head")
    made.train()
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        made.border.keep()
        seconds.append(time.perf_counter() - begun)
    made.close()
    assert min(seconds) < 1e-3


def test_keeping_a_border_does_not_wait_for_the_device(tmp_path):
    made = run(tmp_path)
    made.meters.add("policy/entropy", torch.zeros((), device="meta"), 1)  # reading its value raises
    made.border.keep()
    assert made.border.kept is not None
    made.close()


def test_a_trainer_is_freed_as_soon_as_nobody_holds_it(tmp_path):
    made = run(tmp_path)
    made.train()
    made.close()
    gone = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert gone() is None
    finally:
        gc.enable()
