"""TrainingArguments: which are refused and why, which are set, and that the honoured ones do what Trainer's users expect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from hf_rlhf.config.training_arguments import FORCED, REFUSED, ArgumentError, check_arguments
from tests.helpers import runs

ASKED: dict[str, Any] = {
    "gradient_accumulation_steps": 4,
    "auto_find_batch_size": True,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "ignore_data_skip": True,
    "train_sampling_strategy": "sequential",
    "fp16": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "parallelism_config": object(),
    "torch_compile": True,
    "use_liger_kernel": True,
    "include_num_input_tokens_seen": "all",
    "batch_eval_metrics": True,
    "include_for_metrics": ["inputs"],
    "enable_jit_checkpoint": True,
    "debug": "underflow_overflow",
}
"""A value of each refused argument that somebody may ask for."""


def arguments(**settings: Any) -> TrainingArguments:
    return TrainingArguments("unused", use_cpu=True, report_to="none", **settings)


# Refused and forced


def test_every_refused_argument_is_one_of_trainers_and_is_tried_here():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(REFUSED) <= names
    assert set(FORCED) <= names
    assert set(ASKED) == set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_argument_is_named_with_what_to_do_instead(name):
    args = arguments()
    setattr(args, name, ASKED[name])
    with pytest.raises(ArgumentError) as refused:
        check_arguments(args)
    assert str(refused.value) == f"training.{name}={ASKED[name]!r} is refused: {REFUSED[name]}"


def test_all_refused_arguments_are_named_at_once_before_the_model_is_loaded(tmp_path):
    training = {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}
    with pytest.raises(ArgumentError, match=r"(?s)gradient_accumulation_steps=2.*label_smoothing_factor=0\.1"):
        runs.trainer(tmp_path, policy="/nowhere/at/all", training=training)


def test_several_gpus_in_one_process_are_refused():
    args = arguments()
    args._n_gpu = 2
    with pytest.raises(ArgumentError, match="one process per GPU with `accelerate launch"):
        check_arguments(args)


def test_the_defaults_are_accepted():
    args = arguments()
    check_arguments(args)
    assert {name: getattr(args, name) for name in FORCED} == {name: value for name, (value, _) in FORCED.items()}


@pytest.mark.parametrize("name", FORCED)
def test_a_forced_argument_is_set_whatever_was_asked(name):
    value, _ = FORCED[name]
    args = arguments(**{name: not value})
    check_arguments(args)
    assert getattr(args, name) is value


# Honoured: how a step is taken


def stepped(folder: Path, steps: int = 1, **training: Any) -> torch.Tensor:
    """How far plain SGD goes in float64."""
    made = runs.trainer(folder, dtype=torch.float64, training={"max_steps": steps, **training})
    before = runs.parameters(made)
    made.train(overwrite=True)
    return runs.parameters(made) - before


def test_max_grad_norm_bounds_the_step(tmp_path):
    free = stepped(tmp_path, learning_rate=0.1)
    assert free.norm() > 0.1 * 1e-2
    clipped = stepped(tmp_path, learning_rate=0.1, max_grad_norm=1e-2)
    assert clipped.norm().item() == pytest.approx(0.1 * 1e-2, rel=1e-3)
    assert torch.cosine_similarity(clipped, free, dim=0) > 0.999999


def test_max_grad_norm_clips_policy_and_critic_each_by_its_own_norm(tmp_path):
    options: dict[str, Any] = {
        "advantages": "gae",
        "dtype": torch.float64,
        "critic": {"use": "separate", "coef": 100.0},
    }
    made = runs.trainer(tmp_path, training={"max_steps": 1, "max_grad_norm": 1e-3}, **options)
    before = [runs.parameters(m) for m in (made.actor_critic.policy, made.actor_critic.critic)]
    made.train(overwrite=True)
    after = [runs.parameters(m) for m in (made.actor_critic.policy, made.actor_critic.critic)]
    for a, b in zip(after, before, strict=True):
        assert (a - b).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_the_learning_rate_is_a_factor_of_the_step(tmp_path):
    one, three = stepped(tmp_path, learning_rate=0.01), stepped(tmp_path, learning_rate=0.03)
    assert (three - 3 * one).norm() < 1e-9 * three.norm()


def test_weight_decay_shrinks_the_weights_and_not_the_norms(tmp_path):
    made = runs.trainer(tmp_path, dtype=torch.float64)
    start = {name: p.detach().clone() for name, p in made.actor_critic.policy.named_parameters()}

    def after(decay):
        made = runs.trainer(tmp_path, dtype=torch.float64, training={"max_steps": 1, "weight_decay": decay})
        made.train(overwrite=True)
        return dict(made.actor_critic.policy.named_parameters())

    plain, decayed = after(0.0), after(0.5)
    for name, weight in start.items():
        want = torch.zeros_like(weight) if "norm" in name else 0.1 * 0.5 * weight
        torch.testing.assert_close(plain[name] - decayed[name], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("training", "rates"),
    [
        ({"lr_scheduler_type": "constant"}, [0.1, 0.1, 0.1, 0.1]),
        ({"lr_scheduler_type": "linear"}, [0.1, 0.075, 0.05, 0.025]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0.0, 0.05, 0.1, 0.1]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [0.0, 0.05, 0.1, 0.05]),
    ],
    ids=str,
)
def test_the_schedule_is_trainers_and_counts_optimizer_steps(training, rates, tmp_path):
    made = runs.trained(tmp_path, training={"max_steps": 4, **training})
    assert [entry["learning_rate"] for entry in runs.entries(made)] == pytest.approx(rates)


def test_the_named_optimizer_is_used(tmp_path):
    assert type(runs.trained(tmp_path, training={"optim": "sgd"}).optimizer.optimizer) is torch.optim.SGD
    adam = runs.trained(tmp_path, training={"optim": "adamw_torch", "adam_beta2": 0.5}).optimizer.optimizer
    assert type(adam) is torch.optim.AdamW
    assert adam.param_groups[0]["betas"] == (0.9, 0.5)


# Honoured: how long, how often


@pytest.mark.parametrize(("training", "steps"), [({"max_steps": 3}, 3), ({"num_train_epochs": 3, "max_steps": -1}, 6)])
def test_max_steps_and_epochs_say_when_to_stop(training, steps, tmp_path):
    assert runs.trained(tmp_path, training=training).state.global_step == steps


def test_logging_steps_says_how_often_and_averages_in_between(tmp_path):
    every = runs.entries(runs.trained(tmp_path, training={"max_steps": 6}))
    thirds = runs.entries(runs.trained(tmp_path, training={"max_steps": 6, "logging_steps": 3}))
    assert [entry["step"] for entry in thirds] == [3, 6]
    losses = [entry["policy/loss"] for entry in every]
    assert thirds[0]["policy/loss"] == pytest.approx(sum(losses[:3]) / 3, abs=1e-6)
    assert thirds[1]["policy/loss"] == pytest.approx(sum(losses[3:]) / 3, abs=1e-6)


def test_save_steps_and_save_total_limit_say_what_is_kept(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    runs.trained(tmp_path / "all", training=saving)
    assert sorted(p.name for p in (tmp_path / "all").glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (2, 4, 6, 8)]
    runs.trained(tmp_path / "two", training={**saving, "save_total_limit": 2})
    assert sorted(p.name for p in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_save_strategy_epoch_saves_after_each_pass_over_the_dataset(tmp_path):
    runs.trained(tmp_path, training={"save_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1})
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


SAMPLED_EVALUATION: dict[str, Any] = {
    "rollout": runs.SAMPLED,
    "eval_data": runs.problems(8, seed=3),
    "evaluation": {"num_generations": 4},
}


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4]),
        ({"eval_strategy": "epoch"}, [2, 4]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}, [0, 2, 4]),
        ({"eval_strategy": "no"}, []),
    ],
    ids=str,
)
def test_evaluation_runs_when_asked(training, steps, tmp_path):
    made = runs.trained(tmp_path, training={"max_steps": 4, **training}, **SAMPLED_EVALUATION)
    found = [entry["step"] for entry in made.state.log_history if "eval_reward/total/mean" in entry]
    assert found == steps


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    training = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    training |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward/total/mean"}
    training |= {"greater_is_better": True, "learning_rate": 2.0, "save_total_limit": 2}
    made = runs.trained(tmp_path, training=training, **SAMPLED_EVALUATION)
    seen = {e["step"]: e["eval_reward/total/mean"] for e in made.state.log_history if "eval_reward/total/mean" in e}
    best = max(seen, key=lambda step: (seen[step], -step))
    assert made.state.best_metric == max(seen.values())
    assert Path(made.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert torch.equal(
        runs.parameters(made.model),
        runs.parameters(AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")),
    )
    assert best != 6, "the last model must not be the best for this test to say anything"


# Honoured: how a step is computed


class Rows(TrainerCallback):
    """The rows of every forward of the policy with gradient."""

    def __init__(self):
        self.seen: list[int] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trainer.actor_critic.register_forward_pre_hook(self.count)

    def count(self, module, args):
        if torch.is_grad_enabled():
            self.seen.append(len(args[0].prompt_ids))


@pytest.mark.parametrize(
    ("attention", "limit", "want"),
    [
        *(("padded", 64, [8, 8]), ("padded", 3, [3, 3, 2] * 2), ("padded", 1, [1] * 16)),
        *(("packed", 64, [8, 8]), ("packed", 4, [4] * 4), ("packed", 3, [3, 2, 3] * 2), ("packed", 1, [1] * 16)),
    ],
)
def test_per_device_train_batch_size_caps_the_rows_of_a_micro_batch(attention, limit, want, tmp_path):
    """Packed, the four rows of a prompt stay together where they fit, and what is left of two prompts is one micro-batch."""
    rows = Rows()
    made = runs.trainer(
        tmp_path,
        callbacks=[rows],
        training={"per_device_train_batch_size": limit},
        update={"mini_batches": 2, "attention": attention},
        loss_terms=["entropy"],  # it keeps rows without advantage in the update
    )
    rows.trainer = made
    made.train(overwrite=True)
    assert rows.seen == want


class Prompts(TrainerCallback):
    """The prompts of the rollouts."""

    def __init__(self):
        self.seen: list[Any] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.trainer.buffer.prompt_ids)


def prompts_and_completions(folder: Path, **training: Any) -> tuple[Any, Any]:
    watch = Prompts()
    made = runs.trainer(folder, rollout=runs.SAMPLED, callbacks=[watch], training={"max_steps": 1, **training})
    watch.trainer = made
    made.train(overwrite=True)
    return watch.seen, made.buffer.completion_ids


def test_seed_moves_everything_and_data_seed_the_order_of_the_prompts_alone(tmp_path):
    prompts, completions = prompts_and_completions(tmp_path, seed=1)
    assert prompts_and_completions(tmp_path, seed=1) == (prompts, completions)
    other_prompts, other_completions = prompts_and_completions(tmp_path, seed=2)
    assert other_prompts != prompts
    assert other_completions != completions
    same_order, same_seed = prompts_and_completions(tmp_path, seed=2, data_seed=1)
    assert same_order == prompts
    assert same_seed != completions


FULL: dict[str, Any] = {
    "kl": [{"use": "in_loss"}],
    "reference": "frozen",
    "advantages": "gae",
    "critic": "value_head",
    "loss_terms": ["entropy"],
}


def test_gradient_checkpointing_gives_the_same_parameters(tmp_path):
    def run(**training):
        made = runs.trained(tmp_path, dtype=torch.float64, training={"max_steps": 4, **training}, **FULL)
        return made, runs.parameters(made)

    _, plain = run()
    made, checkpointed = run(gradient_checkpointing=True)
    assert made.model.is_gradient_checkpointing
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-9)


def test_bf16_computes_in_bfloat16_over_float32_weights(tmp_path):
    made = runs.trained(tmp_path, training={"bf16": True, "max_steps": 4, "logging_steps": 1}, **FULL)
    plain = runs.trained(tmp_path, training={"max_steps": 4}, **FULL)
    assert {p.dtype for p in made.actor_critic.parameters()} == {torch.float32}
    assert torch.isfinite(runs.parameters(made)).all()
    ours, theirs = runs.entries(made)[0], runs.entries(plain)[0]
    assert ours["policy/entropy"] != theirs["policy/entropy"], "nothing was computed in bfloat16"
    assert ours["policy/entropy"] == pytest.approx(theirs["policy/entropy"], rel=0.02)
    assert ours["policy/ratio"] == pytest.approx(1, abs=1e-3), "rollout and update compute alike"


def test_use_cpu_and_output_dir_are_where_it_runs_and_writes(tmp_path):
    made = runs.trained(tmp_path / "here", training={"max_steps": 1})
    assert made.model.device.type == "cpu"
    assert (tmp_path / "here" / "metrics.jsonl").is_file()
