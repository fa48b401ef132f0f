"""The plan in five lines: the algorithm in words is made from the plugins and right for every recipe of the tree."""

from __future__ import annotations

import dataclasses
import re
import string
from types import SimpleNamespace
from typing import Any

import pytest

from hf_rlhf.axes import AXES, Plugin
from hf_rlhf.config.pipeline import is_pipeline, load_pipeline
from hf_rlhf.config.plan_in_words import (
    algorithm_in_words,
    batch_in_words,
    data_in_words,
    memory_in_words,
    model_in_words,
    offline_batch_in_words,
)
from hf_rlhf.config.recipe import OfflineRecipe, Recipe, load_recipe
from hf_rlhf.registry.host import get_host
from tests.helpers.paths import ROOT

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
NEUTRAL = {"critic": "none", "reference": "none", "rollout_correction": "none", "optimizer": "trainer"}
"""Choices that the line leaves out."""
SILENT = {"rollout", "rewards", "kl", "kl_estimator", "doctor", "sync"}
"""Axes that it names otherwise, by numbers, labels and places, or that change no algorithm."""


def recipes() -> list[tuple[str, Recipe]]:
    """Every recipe of the tree, and every stage of those that have stages."""
    found: list[tuple[str, Recipe]] = []
    for name in NAMES:
        if is_pipeline(name):
            found += [(f"{name}:{stage.name}", stage.recipe) for stage in load_pipeline(name).stages]
        else:
            found.append((name, load_recipe(name)))
    return found


def words_of(recipe: Recipe) -> str:
    if isinstance(recipe, OfflineRecipe):
        return recipe.trainer().in_words()
    return algorithm_in_words(recipe.algorithm())


@pytest.mark.parametrize(("name", "recipe"), [pytest.param(*x, id=x[0]) for x in recipes()])
def test_the_line_of_a_recipe_says_what_its_settings_say(name: str, recipe: Recipe) -> None:
    said = words_of(recipe)
    assert "_" not in re.sub(r"reward [^;]*|k\d_\w+|l1_\w+", "", said), "names of plugins are not words"
    if isinstance(recipe, OfflineRecipe):
        assert ("DPO" in said) == (recipe.raw["trainer"]["use"] == "dpo")
        assert ("supervised" in said) == (recipe.raw["trainer"]["use"] == "sft")
        return
    raw, a = recipe.raw, recipe.algorithm()
    assert [
        f"KL to the reference {where}" in said for where in ("in the reward", "in the loss", "in the advantages")
    ] == [any(place in kl.places for kl in a.kl) for place in ("reward", "loss", "advantage")]
    assert said.count("KL to the reference") == len(raw["kl"])
    parts = [part for part in said.split("; ") if part.startswith("KL to the reference")]
    for kl, part in zip(raw["kl"], parts, strict=True):
        assert ("beta" in kl) == ("beta" in part)
        assert f"beta {kl['beta']:g}" in part if "beta" in kl else "only measured" in part
        assert kl["estimator"]["use"] in part
        assert f"at most {kl['clamp']:g}" in part if kl["clamp"] else "at most" not in part
    for source in raw["rewards"]:
        assert (f"{source['weight']:g} x {source['label'] or source['use']}" in said) == (source["weight"] != 1)
    loss = raw["policy_loss"]
    if loss["use"] in ("ppo_clip", "dual_clip", "gspo"):
        assert f"clipped to [{1 - loss['epsilon_low']:.5g}, {1 + loss['epsilon_high']:.5g}]" in said
        assert ("at most 3" in said or "at most 10" in said) >= (loss["use"] == "dual_clip")
    else:
        assert "ratio clipped to [0.8" not in said
    advantages = raw["advantages"]
    if advantages["use"] == "gae":
        assert f"GAE (gamma {advantages['gamma']:g}" in said
        assert advantages["length_adaptive"] or f"lambda {advantages['lam']:g}" in said
        assert ("whitened advantages" in said) == advantages["whiten"]
    assert ("its group's standard deviation" in said) == (
        advantages["use"] == "group_norm" and advantages["statistics"] == "group"
    )
    assert ("other rows" in said) == (advantages["use"] == "leave_one_out" or "others" in advantages.values())
    assert ("entropy bonus" in said) == any("entropy" in term["use"] for term in raw["loss_terms"])
    assert ("groups of equal scores are dropped" in said) == any(x["use"] == "zero_variance" for x in raw["filters"])
    assert ("to the sampler" in said) == (raw["rollout_correction"]["use"] != "none")
    assert ("natural-gradient" in said) == (raw["optimizer"]["use"] == "trpo")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "grpo",
            "reward math_answer; advantage: return minus its group's mean, over its group's standard deviation; loss: ratio "
            "clipped to [0.8, 1.2], mean over completions of their token means; KL to the reference in the loss (beta 0.04, k3)",
        ),
        (
            "rloo",
            "reward math_answer; advantage: return minus the mean return of the group's other rows; loss: plain policy "
            "gradient, mean over completions of their token sums; KL to the reference in the reward (beta 0.05, k1)",
        ),
        ("dpo", "DPO (sigmoid loss, beta 0.1): chosen above rejected completions, relative to the initial model"),
        ("sft", "supervised fine-tuning on completions"),
    ],
)
def test_well_known_algorithms_are_recognized(name: str, said: str) -> None:
    assert words_of(load_recipe(name)) == said


def speaking() -> list[tuple[str, type[Plugin]]]:
    host = get_host()
    return [
        (f"{axis}.{name}", host.get(axis, name))
        for axis in AXES
        if axis not in SILENT
        for name in host.names(axis)
        if NEUTRAL.get(axis) != name and host.find(axis, name).package == "hf_rlhf"
    ]


@pytest.mark.parametrize(("name", "cls"), [pytest.param(*x, id=x[0]) for x in speaking()])
def test_every_built_in_plugin_has_words_and_they_follow_its_settings(name: str, cls: type[Plugin]) -> None:
    if name == "kl_controller.fixed":
        return
    assert cls.words or cls.in_words is not Plugin.in_words, "words, or in_words"
    known = {field.name for field in dataclasses.fields(cls)}
    assert {field for _, field, _, _ in string.Formatter().parse(cls.words) if field} <= known


def test_a_plugin_without_words_is_called_by_its_name() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Mine(Plugin):
        name = "my_own"

    assert Mine().in_words() == "my own"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["advantages={use: mix, parts: [{use: leave_one_out}, {use: reinforce, gamma: 0.9}], weights: [0.5, 2]}"],
         "0.5 x (return minus the mean return of the group's other rows) + 2 x (return (gamma 0.9))"),
        (["advantages={use: baseline, baseline: {use: constant, value: 0.25}}"], "reward to go minus 0.25"),
        (["kl.0.controller={use: adaptive, target: 4}"], "KL to the reference in the loss (beta 0.04, k3, adapted to 4 nats)"),
        (["kl.0={use: in_advantage, level: sequence}"], "KL to the reference in the advantages (beta 0.05, k1, per completion)"),
        (["loss_terms=[{use: entropy, coef: 0.003}]"], "+ entropy bonus of 0.003"),
        (["filters=[{use: overlong}]"], "truncated completions are dropped"),
        (["policy_loss.epsilon_high=0.28"], "ratio clipped to [0.8, 1.28]"),
        (["rewards.0.weight=2"], "reward 2 x math_answer;"),
    ],
    ids=lambda x: x[0][:40] if isinstance(x, list) else "",
)  # fmt: skip
def test_the_words_follow_the_settings(overrides: list[str], said: str) -> None:
    assert said in words_of(load_recipe("grpo", overrides))


def arguments(**given: Any) -> Any:
    known = {"max_steps": -1, "num_train_epochs": 3.0, "per_device_train_batch_size": 64, "world_size": 1}
    return SimpleNamespace(**(known | {"gradient_accumulation_steps": 1} | given))


def test_the_arithmetic_of_batches_is_right() -> None:
    ppo = load_recipe("ppo").algorithm()
    assert batch_in_words(ppo, arguments(), 1000) == (
        "128 prompts x 1 completion of up to 512 tokens = 128 per rollout; 4 mini-batches x 2 epochs = 8 optimizer steps of "
        "32; 3 epochs of the dataset = 168 steps"
    )
    grpo = load_recipe("grpo", ["rollout.prompts=8"]).algorithm()
    assert batch_in_words(grpo, arguments(max_steps=5, per_device_train_batch_size=16, world_size=2), None) == (
        "8 prompts x 8 completions of up to 512 tokens = 64 per rollout; 1 optimizer step each; micro-batches of at most 16; "
        "over 2 processes; 5 steps in all"
    )
    games = load_recipe("self_play").algorithm()
    assert "16 prompts x 8 completions of up to 2 tokens = 128 per rollout; each of up to 2 agents = 256 rows" in (
        batch_in_words(games, arguments(), None)
    )
    assert offline_batch_in_words(arguments(gradient_accumulation_steps=2, world_size=2), False, 1000) == (
        "64 rows x 2 micro-batches x 2 processes = 256 per optimizer step; 3 epochs of the dataset = 12 steps"
    )
    assert offline_batch_in_words(arguments(), True, None) == (
        "64 packed sequences per optimizer step; 3 epochs of the dataset"
    )


def test_models_and_data_are_named_and_unknown_ones_say_how_to_name_them() -> None:
    recipe = load_recipe("ppo", ["model.path=tiny", "model.lora={}", "critic.init=policy"])
    said = model_in_words(recipe.algorithm(), recipe.model, None, True)
    assert said == (
        "tiny (an adapter of rank 16 is trained); reference: the model without its adapter; critic: a separate model; reward "
        "model: Skywork/Skywork-Reward-V2-Qwen3-0.6B"
    )
    assert (
        data_in_words("rows.jsonl", "prompts", 1234, 0, 17)
        == "rows.jsonl: 1,234 prompts of up to 17 tokens, none held out"
    )
    assert data_in_words(None, "rows", None, None) == "not named yet: --dataset"
    assert data_in_words(None, "prompts", 10, 2) == "given in Python: 10 prompts, 2 held out"
    grpo = load_recipe("grpo")
    assert model_in_words(grpo.algorithm(), grpo.model, None, False).startswith("not named yet: --model")
    assert model_in_words(grpo.algorithm(), grpo.model, "Mine", False).startswith("Mine (all weights are trained)")
    assert "dropout" not in said
    for setting in ("model.dropout=true", "model.lora={dropout: 0.1}"):
        drawn = load_recipe("grpo", [setting])
        assert "equal completions pass one by one" in model_in_words(drawn.algorithm(), drawn.model, "Mine", False)


def test_memory_is_the_largest_phase_with_what_it_assumes() -> None:
    memory = {"rollout": {"weights": 100.0, "cache": 50.0}, "update": {"weights": 100.0, "gradients": 100.0}}
    notes = ["prompts of 256 tokens are assumed: dataset.max_prompt_tokens sets a bound"]
    assert memory_in_words(memory, notes) == (
        "about 200 MiB per process at the peak, in the update; prompts of 256 tokens are assumed"
    )
    assert (
        memory_in_words({"update": {"weights": 20480.0}}, []) == "about 20 GiB per process at the peak, in the update"
    )
    assert memory_in_words({}, ["not estimated: no model is named"]) == "not estimated: no model is named"
