"""What is refused, or said, before a model is loaded."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from hf_rlhf.cli.runs.run import check, train
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.data.sources import DatasetError
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.setup import setup_run
from tests.helpers import runs

BUILTIN = ("model.path=builtin:addition", "dataset.path=builtin:addition")


def refusal(folder: Any, recipe: str, *overrides: str) -> str:
    """Return why `check` refuses a recipe on the built-in model; empty if it does not."""
    try:
        check(load_recipe(recipe, [*BUILTIN, *overrides]), str(folder))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("rows", "max_steps", "warned"), [(5, -1, True), (4, -1, False), (5, 2, False)])
def test_prompts_that_an_epoch_leaves_out_are_said_once(rows, max_steps, warned, tmp_path, caplog):
    training = {"max_steps": max_steps, "num_train_epochs": 1}
    rollout = {**runs.SCRIPTED, "prompts": 2}
    made = runs.trained(tmp_path, data=runs.problems(rows), rollout=rollout, training=training)
    assert made.stream.epoch == (min(1, 4 / rows) if max_steps < 0 else 2 / rows)
    said = [text for text in caplog.messages if "leaves 1 of the 5 prompts out" in text]
    assert len(said) == warned


@pytest.mark.parametrize("recipe", ["quickstart", "sft"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning_rate=-1"], "training.learning_rate must be at least 0 and finite, got -1"),
        (["adam_beta1=1.0"], "training.adam_beta1 must be at least 0 and below 1, got 1.0"),
        (["adam_beta2=-0.5"], "training.adam_beta2 must be at least 0 and below 1, got -0.5"),
        (["adam_epsilon=-1e-8"], "training.adam_epsilon must be at least 0 and finite, got -1e-08"),
        (["weight_decay=-0.1"], "training.weight_decay must be at least 0 and finite, got -0.1"),
        (["optim=sgd", "optim_args=momentum"], "training.optim_args must be KEY=VALUE pairs"),
        (["optim=sgd", "optim_args=momentum=-1"], "cannot be built: Invalid momentum value: -1.0"),
        (["optim=sgd", "optim_args=momentum=much"], "cannot be built: could not convert string to float: 'much'"),
        (["optim=sgd", "optim_args=momentun=0.9"], "optim=sgd does not read 'momentun'"),
        (["optim=adamw_torch", "optim_args=momentum=0.9"], "optim=adamw_torch does not read 'momentum'"),
        (["lr_scheduler_type=cosine", "lr_scheduler_kwargs={foo: 1}"], "lr_scheduler_type=cosine"),
        (["lr_scheduler_type=polynomial", "lr_scheduler_kwargs={lr_end: 1}"], "must be smaller than initial lr"),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_built_is_refused_by_check(recipe, overrides, message, tmp_path):
    assert message in refusal(tmp_path, recipe, *(f"training.{override}" for override in overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=sgd", "optim_args=momentum=0.9, nesterov=true"],
        ["optim=adafactor", "learning_rate=0"],
        ["lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr_rate: 0.1}", "warmup_steps=0.1"],
    ],
)
def test_an_optimizer_or_schedule_that_can_be_built_is_not_refused(overrides, tmp_path):
    assert not refusal(tmp_path, "quickstart", *(f"training.{override}" for override in overrides))


def test_python_gets_the_same_refusal(tmp_path):
    with pytest.raises(ValueError, match=r"training\.learning_rate must be at least 0 and finite, got -1"):
        runs.trainer(tmp_path, training={"learning_rate": -1.0})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.max_new_tokens=100000"],
            "rollout.max_new_tokens=100000 leaves no room for a prompt in the model's context",
        ),
        (["dataset.max_prompt_tokens=100000"], "dataset.max_prompt_tokens=100000 and rollout.max_new_tokens="),
        (
            ["rollout.num_generations=8", "rollout.max_rows=7"],
            "rollout.max_rows must be at least rollout.num_generations=8",
        ),
    ],
)
def test_lengths_and_rows_that_do_not_fit_are_refused_by_check(overrides, message, tmp_path):
    assert message in refusal(tmp_path, "quickstart", *overrides)


def test_lengths_are_checked_against_a_model_given_in_python(tmp_path):
    room = tiny_policy()[0].config.max_position_embeddings - runs.SAMPLED["max_new_tokens"]
    runs.trainer(tmp_path, rollout=runs.SAMPLED, dataset={"max_prompt_tokens": room})
    with pytest.raises(ValueError, match=f"dataset.max_prompt_tokens={room + 1} and rollout.max_new_tokens=5 must fit"):
        runs.trainer(tmp_path, rollout=runs.SAMPLED, dataset={"max_prompt_tokens": room + 1})


@pytest.mark.parametrize("recipe", ["quickstart", "sft"])
def test_a_disk_without_room_for_the_first_checkpoint_is_refused_before_a_model_loads(recipe, tmp_path, monkeypatch):
    def free(mib: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=mib * MIB))

    free(7)  # the model has 2.5 MiB, and AdamW twice as much
    full = refusal(tmp_path / "new", recipe, "training.save_strategy=epoch")
    assert (
        f"no space left for a checkpoint in {tmp_path / 'new'}: it takes at least trained weights 3 MiB, optimizer 5"
        in full
    )
    assert "7 MiB are free" in full
    assert not refusal(tmp_path, recipe, "training.save_strategy=epoch", "training.save_only_model=true")
    assert not refusal(tmp_path, recipe, "training.save_strategy=no")
    assert not refusal(tmp_path, recipe, "training.save_strategy=epoch", "training.optim=sgd")
    free(8)
    assert not refusal(tmp_path, recipe, "training.save_strategy=epoch")
    free(2)
    with pytest.raises(UserError, match="no space left for the model"):
        train(load_recipe(recipe, [*BUILTIN, "training.save_strategy=no"]), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m['content'] }}|{% endfor %}"
)


@pytest.mark.parametrize("source", ["reward_model", "token_reward_model"])
@pytest.mark.parametrize("held_out", [False, True])
def test_rows_that_a_reward_model_cannot_read_are_refused_before_it_is_loaded(source, held_out, tmp_path):
    """The folder has no weights; the policy's template takes every row."""
    policy, tokenizer = tiny_policy()
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(tmp_path / "reward")
    policy.config.save_pretrained(tmp_path / "reward")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    question = {"role": "user", "content": "2+3="}
    good = [{"prompt": [question], "answer": "5"}] * 4
    bad = [*good[1:], {"prompt": [{"role": "system", "content": "Add."}, question], "answer": "x"}]
    rewards: list[dict[str, Any]] = [{"use": source, "model": str(tmp_path / "reward")}]
    train, evaluation = (good, {"hard": bad}) if held_out else (bad, None)

    def set_up() -> Any:
        recipe = runs.recipe(rewards=rewards, rollout=runs.SAMPLED)
        return setup_run(policy, recipe, recipe.training_arguments(str(tmp_path)), train, evaluation, tokenizer, None)

    with pytest.raises(
        DatasetError, match=rf"row 4 \(the first is 1\): rewards\.{source}, .*reward': .* no system here"
    ):
        set_up()
    rewards[0]["when"] = {"answer": "5"}
    set_up()
