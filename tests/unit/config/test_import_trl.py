"""Configs of TRL as recipes: every field has its place or its reason, the formulas are those of the parity tests, batches
follow TRL's arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from hf_rlhf.config.from_trl.converting import SOFT_OVERLONG, convert
from hf_rlhf.config.from_trl.reading import fields_of, read_config, trainer_of
from hf_rlhf.config.recipe import OfflineRecipe, resolve
from hf_rlhf.config.recipe_yaml import write_yaml
from hf_rlhf.config.training_arguments import ArgumentError, check_arguments
from hf_rlhf.runtime.errors import UserError
from tests.helpers.parity import AXES, CASES, RECIPES, recipe

TRAINERS = ("grpo", "rloo", "dpo")
VALUES: dict[str, Any] = {
    "model_init_kwargs": {"device_map": "auto"},
    "chat_template_kwargs": {"enable_thinking": False},
    "generation_kwargs": {"no_repeat_ngram_size": 3},
    "cache_implementation": "static",
    "generation_batch_size": 32,
    "steps_per_generation": 2,
    "num_generations": 4,
    "importance_sampling_level": "sequence",
    "multi_objective_aggregation": "normalize_then_sum",
    "scale_rewards": "batch",
    "reward_weights": [0.5],
    "reward_clip_range": [-1.0, 1.0],
    "reward_funcs": ["accuracy_reward"],
    "f_divergence_type": "js_divergence",
    "lora_target_modules": ["q_proj"],
    "lora_target_parameters": ["experts"],
    "lora_modules_to_save": ["lm_head"],
    "dtype": "bfloat16",
    "bnb_4bit_quant_type": "fp4",
    "delta": 1.5,
    "label_smoothing": 0.2,
    "eval_strategy": "steps",
    "datasets": [{"path": "x"}],
    "env": {"A": "b"},
    "max_length": 77,
}
"""Values other than the default, where the type of the default does not give one."""
LOSSES = {"grpo": "sapo", "dpo": ["ipo"]}
WITH: dict[str, dict[str, Any]] = {
    "sapo_": {"loss_type": "sapo"},
    "vespo_": {"loss_type": "vespo"},
    "sync_ref_model": {"beta": 0.1},
    "ref_model_": {"sync_ref_model": True, "beta": 0.1},
    "entropy_": {"use_adaptive_entropy": True},
    **{start: {"use_peft": True} for start in ("lora_", "use_dora", "use_rslora", "load_in", "bnb", "use_bnb")},
    "use_bias_correction_kl": {"beta": 0.1},
    "num_completions_to_print": {"log_completions": True},
    "log_completions": {"num_completions_to_print": 3},
    "num_generations_eval": {"eval_strategy": "steps"},
    "dataset_test_split": {"eval_strategy": "steps"},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "discopop_tau": {"loss_type": ["discopop"]},
}
"""Beginnings of fields that only count beside others."""
SILENT = {"average_tokens_across_devices", "logging_nan_inf_filter", "disable_dropout"}
"""Fields whose other value is what a recipe does in any case; dropout, which TRL keeps, is off unless the config keeps it."""


def other(trainer: str, name: str, default: Any) -> Any:
    """A value of a field that is not its default."""
    if name == "loss_type":
        return LOSSES[trainer]
    if name in VALUES:
        return VALUES[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default * 2 or 1
    return "other"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_field_changes_the_recipe_or_is_listed_with_a_reason(trainer):
    lost = []
    for name, default in fields_of(trainer).items():
        found = {k: x for start, more in WITH.items() if name.startswith(start) for k, x in more.items()}
        beside = {k: x for k, x in found.items() if k in fields_of(trainer) and k != name}
        before = convert(beside, trainer)
        after = convert({**beside, name: other(trainer, name, default)}, trainer)
        noted = dict(after.notes).get(name)
        if after.recipe == before.recipe and not noted:
            lost.append(name)
    assert not [name for name in lost if name not in SILENT]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_field_at_its_default_is_not_listed(trainer):
    given = {name: x for name, x in fields_of(trainer).items() if name not in ("bf16", "disable_dropout")}
    assert [name for name, _ in convert(given, trainer).notes] == [name for name, _ in convert({}, trainer).notes]


def of_axes(found: dict[str, Any]) -> dict[str, Any]:
    return {axis: found[axis] for axis in AXES}


def resolved(ours: dict[str, Any]) -> dict[str, Any]:
    base = {"rollout": {"use": "scripted", "prompts": 4, "num_generations": 4}, "rewards": ["exact_match"]}
    return of_axes(resolve({**base, **{axis: ours[axis] for axis in AXES if axis in ours}}).raw)


@pytest.mark.parametrize("name", [name for name in CASES if name != "rloo"])
def test_the_formulas_are_those_whose_updates_equal_trl_s(name):
    """tests/integration/test_parity_trl.py trains these pairs; `rloo` at ratio 1 is written as reinforce there."""
    case = CASES[name]
    weights = ["accuracy_reward"] * len(case.theirs.get("reward_weights", ["x"]))
    made = convert({**case.theirs, "reward_funcs": weights, "num_generations": 4}, case.trainer.lower())
    assert of_axes(resolve(made.recipe).raw) == resolved(case.ours)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("rloo", "cispo")])
def test_trl_s_settings_for_a_recipe_of_ours_give_it_back(name):
    made = convert({**RECIPES[name]}, "rloo" if name.startswith("rloo") else "grpo")
    assert of_axes(resolve(made.recipe).raw) == recipe(name)


@pytest.mark.parametrize(
    ("own", "accumulated", "sizes", "processes"),
    [
        (own, accumulated, sizes, processes)
        for own, accumulated, processes in itertools.product((4, 16), (1, 4), (1, 2))
        for sizes in ({}, {"steps_per_generation": 4}, {"steps_per_generation": 8}, {"generation_batch_size": 64})
        if "generation_batch_size" not in sizes or 64 // (own * processes) % accumulated == 0
    ],
)
def test_batches_follow_trl_s_arithmetic(own, accumulated, sizes, processes, monkeypatch):
    from trl import GRPOConfig

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: processes))
    given = {
        "per_device_train_batch_size": own,
        "gradient_accumulation_steps": accumulated,
        "num_generations": 4,
        **sizes,
    }
    theirs = GRPOConfig("unused", use_cpu=True, bf16=False, num_iterations=3, **given)
    made = convert({**given, "num_iterations": 3}, "grpo", processes)
    rollout, update = made.recipe["rollout"], made.recipe["update"]
    assert rollout["prompts"] * 4 == theirs.generation_batch_size
    steps = theirs.steps_per_generation * 3 / accumulated
    whole = rollout["prompts"] % (theirs.steps_per_generation // accumulated) == 0
    assert (
        (update["mini_batches"] * update["epochs"] == steps)
        == whole
        == ("steps_per_generation" not in dict(made.notes))
    )
    resolve(made.recipe).algorithm()


def test_several_generations_in_an_optimizer_step_become_one_rollout():
    made = convert(
        {"gradient_accumulation_steps": 4, "steps_per_generation": 1, "per_device_train_batch_size": 8}, "grpo"
    )
    assert (made.recipe["rollout"]["prompts"], made.recipe["update"]["mini_batches"]) == (4, 1)
    assert "one optimizer step here" in dict(made.notes)["steps_per_generation"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trl_s_defaults_are_written_out_and_accepted(trainer):
    import trl

    made = convert({"reward_funcs": ["accuracy_reward"]} if trainer != "dpo" else {}, trainer)
    assert made.notes == []
    theirs = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig, "dpo": trl.DPOConfig}[trainer]("unused", use_cpu=True)
    ours = resolve(made.recipe, name="x").training_arguments("unused")
    same = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    differing = {
        name: (getattr(ours, name), getattr(theirs, name))
        for name in same
        if getattr(ours, name) != getattr(theirs, name) and not name.startswith("logging_dir")
    }
    assert differing.keys() <= {"remove_unused_columns", "disable_tqdm", "run_name", "use_cpu"}


def test_refused_arguments_are_listed_and_left_out():
    given = {
        "fp16": True,
        "debug": "underflow_overflow",
        "neftune_noise_alpha": 5.0,
        "dataloader_num_workers": 2,
        "bf16": False,
    }
    made = convert({**given, "reward_funcs": ["accuracy_reward"]}, "grpo")
    assert dict(made.notes).keys() == {"fp16", "debug", "neftune_noise_alpha", "dataloader_num_workers"}
    with pytest.raises(ArgumentError, match="fp16"):
        check_arguments(TrainingArguments("unused", use_cpu=True, fp16=True))
    check_arguments(resolve(made.recipe, name="x").training_arguments("unused"))


def test_rewards_of_trl_s_command_line_are_functions_here():
    given = {"reward_funcs": ["think_format_reward", "get_soft_overlong_punishment", "os.path.getsize"]}
    made = convert({**given, "reward_weights": [1, 0.5, 2], "reward_model_name_or_path": None}, "grpo")
    assert made.recipe["rewards"] == [
        {"use": "function", "function": "trl.rewards:think_format_reward"},
        {**SOFT_OVERLONG, "weight": 0.5},
        {"use": "function", "function": "os.path:getsize", "weight": 2.0},
    ]


def test_the_overlong_punishment_is_trl_s():
    from trl.rewards import get_soft_overlong_punishment

    from hf_rlhf.batch import Rollouts
    from hf_rlhf.config.recipe import load_plugin

    lengths = [1, 1023, 1024, 1025, 1100, 1279, 1280, 1281, 2000]
    theirs = get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    ours = load_plugin("rewards", "length", **{k: x for k, x in SOFT_OVERLONG.items() if k != "use"})
    rows = [""] * len(lengths)
    masks = [[1] * length for length in lengths]
    seen = Rollouts(
        prompts=rows,
        completions=rows,
        prompt_ids=masks,
        completion_ids=masks,
        masks=masks,
        finish_reasons=["stop"] * len(rows),
        columns={},
    )
    assert ours(seen) == pytest.approx(theirs(completion_ids=[[0] * length for length in lengths]))


def test_yaml_1_1_is_read_as_trl_reads_it(tmp_path):
    (tmp_path / "c.yaml").write_text(
        'learning_rate: 1e-6\nbeta: .1\nuse_peft: yes\nmodel_init_kwargs: \'{"dtype": "bfloat16"}\'\n'
    )
    made = convert(read_config(tmp_path / "c.yaml"), "grpo").recipe
    assert made["training"]["learning_rate"] == 1e-6
    assert made["model"] == {"dtype": "bfloat16", "lora": {"r": 16, "alpha": 32, "dropout": 0.05}}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("processes", [1, 4])
def test_a_config_that_trl_has_written_is_read_as_what_it_was_made_of(trainer, processes, tmp_path, monkeypatch):
    import trl

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: processes))
    of_all = {"beta": 0.2, "learning_rate": 3e-6, "gradient_checkpointing": False, "use_cpu": True, "max_steps": 7}
    own = {
        "grpo": {"loss_type": "dr_grpo", "num_iterations": 2},
        "rloo": {"reward_weights": [0.5]},
        "dpo": {"loss_type": "ipo"},
    }
    given = {**of_all, **own[trainer]}
    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig, "dpo": trl.DPOConfig}[trainer]
    (tmp_path / "config.json").write_text(config(str(tmp_path / "out"), **given).to_json_string())
    written = convert(read_config(tmp_path / "config.json"))
    plain = convert(given, trainer, processes)
    written.recipe["training"].pop(
        "activation_checkpointing"
    )  # the new name of gradient_checkpointing, which TRL sets too
    assert (written.trainer, written.recipe) == (trainer, plain.recipe)
    assert dict(written.notes).keys() == {*dict(plain.notes), "output_dir"}


def test_the_trainer_is_told_by_the_fields():
    assert trainer_of({"loss_type": "dapo", "scale_rewards": "group"}) == "grpo"
    assert trainer_of({"normalize_advantages": True}) == "rloo"
    assert trainer_of({"label_smoothing": 0.1}) == "dpo"


@pytest.mark.parametrize(
    ("given", "trainer", "said"),
    [
        ({"beta": 0.1}, None, "Pass --trainer"),
        ({"betta": 0.1}, None, "Did you mean 'beta'"),
        ({"scale_rewards": "group"}, "dpo", "has no field 'scale_rewards'"),
        ({"loss_type": "gspo"}, "grpo", "loss_type must be one of"),
        ({"scale_rewards": "all"}, "grpo", "scale_rewards must be"),
        ({"num_generations": 3}, "grpo", "must divide the 8 rows"),
        ({"generation_batch_size": 8, "steps_per_generation": 3}, "grpo", "exclude each other"),
        ({"generation_batch_size": 12}, "grpo", "must be a multiple of 8"),
        ({"reward_funcs": ["mine"]}, "grpo", "reward_funcs must be one of"),
        ({"reward_funcs": ["a.b"], "reward_weights": [1, 2]}, "grpo", "a weight for each of the 1 rewards"),
    ],
)
def test_what_trl_refuses_is_refused(given, trainer, said):
    with pytest.raises(UserError, match=said):
        convert(given, trainer)


@pytest.mark.parametrize(("text", "said"), [("- a", "must be a mapping"), ("{", "must be YAML")])
def test_a_file_that_is_no_config_is_refused(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_config(tmp_path / "c.yaml")


def test_a_recipe_survives_its_yaml():
    for trainer in TRAINERS:
        made = convert({"model_name_or_path": "a/b", "lora_r": 4, "use_peft": True}, trainer).recipe
        assert yaml.safe_load(write_yaml(made)) == json.loads(json.dumps(made))
        assert isinstance(resolve(made), OfflineRecipe) == (trainer == "dpo")
