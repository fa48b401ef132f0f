"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import load_recipe
from hf_rlhf.axes import AXES
from hf_rlhf.config.recipe import read_recipe
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.checkpoint_state import load_state
from hf_rlhf.testing import tiny_policy
from tests.helpers import stepping
from tests.helpers.tiers import tiers
from tests.helpers.waits import scaled, until

SAMPLED = {"rollout": {"use": "generate", "prompts": 3, "num_generations": 4, "max_new_tokens": 6}}
REWARDS = {"rewards": [{"use": "format", "pattern": ".*[a-f].*"}]}
CASES: dict[str, dict[str, Any]] = {
    "everything": {
        "kl": [{"use": "in_reward"}, {"use": "in_loss", "estimator": "k3"}, {"use": "monitor"}],
        "reference": "frozen",
        "advantages": {"use": "gae", "lam": 0.95, "whiten": True},
        "critic": {"use": "separate", "learning_rate": 0.01, "warmup_steps": 3},
        "loss_terms": [{"use": "entropy"}],
    },
    "value head": {"advantages": "gae", "critic": {"use": "value_head"}},
    "normalised": {
        "rewards": [{"use": "length", "target": 1, "maximum": 9, "clip": [-0.9, 0.0], "normalize": "mean_std"}],
        "advantages": "reinforce",
    },
    "by difficulty": {"sampler": {"use": "difficulty", "warmup": 1, "floor": 0.01}, "advantages": "reinforce"},
    "filtered": {"filters": [{"use": "zero_variance", "resample": 2}], "advantages": "leave_one_out"},
}
EPISODES: dict[str, dict[str, Any]] = {
    "forks": {
        "environment": [{"use": "tests.helpers.environments:Forking"}],
        "rewards": ["episode"],
        "kl": [{"use": "in_loss", "estimator": "k3"}],
        "reference": "frozen",
    },
    "agents": {
        "environment": [{"use": "tests.helpers.environments:Duel"}],
        "rewards": ["episode"],
        "filters": [{"use": "zero_variance", "resample": 2}],
    },
}


def recipe(name: str) -> dict[str, Any]:
    """The axis choices of a shipped recipe, on a small rollout and without a reward model to download."""
    small = ["rollout.prompts=3", "rollout.max_new_tokens=6", "model.path=null", "dataset.path=null"]
    several = bool(load_recipe(name).raw["environment"])  # whose words have letters of the format
    rewards = [{"use": "length", "target": 3, "maximum": 24}] if several else REWARDS["rewards"]
    small += [f"rewards={json.dumps(rewards)}", "update.mini_batches=3", "update.epochs=1"]
    if load_recipe(name).raw["rollout"]["use"] == "mixed":
        small += ["rewards=[]", "rollout.column=answer"]
    small += ["reference.context=answer"] if "context" in load_recipe(name).raw["reference"] else []
    small += ["critic.init=policy"] if load_recipe(name).raw["critic"].get("init") == "reward" else []
    raw = load_recipe(name, small).raw
    return {axis: raw[axis] for axis in AXES if axis in raw}


RECIPES = {
    f"recipe {offer.name}": recipe(offer.name)
    for offer in get_host().recipes()
    if offer.package == "hf_rlhf" and not {"trainer", "stages"} & set(read_recipe(offer.name))
}


def kept(axes: dict[str, Any]) -> dict[str, Any]:
    """The choices of a recipe that a checkpoint has something of: the others resume alike whatever they are."""
    return {
        axis: x for axis, x in axes.items() if axis in ("rollout", "filters", "critic", "reference", "optimizer", "kl")
    }


def specification(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    chosen = {**CASES, **RECIPES, **EPISODES}[name]
    reference = chosen.get("reference")
    if isinstance(reference, dict) and reference["use"] == "model":
        for part in tiny_policy(seed=1):
            part.save_pretrained(folder / "teacher")
        chosen = {**chosen, "reference": {**reference, "path": str(folder / "teacher")}}
    by_trpo = chosen.get("optimizer", {}).get("use") == "trpo"
    training = {
        "max_steps": 9,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "max_grad_norm": 0.0 if by_trpo else 1.0,
        "save_total_limit": 3,
    }
    return {
        "output_dir": str(folder / "out"),
        "algorithm": {**SAMPLED, **REWARDS, **chosen},
        "update": {"mini_batches": 3, "epochs": 1},
        "training": {**training, "lr_scheduler_type": "linear", "per_device_train_batch_size": 3},
        "dtype": "float32",
        "prompts": 5,
        **more,
    }


@pytest.mark.parametrize("name", CASES)
def test_resuming_anywhere_gives_equal_bits(name, tmp_path):
    """At a rollout's border, in the middle of its mini-batches, in a later epoch."""
    straight = stepping.run(specification(tmp_path / "straight", name))
    for stop in (3, 4, 8):
        spec = specification(tmp_path / f"stopped{stop}", name)
        stopped = stepping.run(spec, stop=stop)
        assert not torch.equal(stopped, straight)
        assert torch.equal(stepping.run(spec, resume=True), straight), f"stopped at {stop}"


@pytest.mark.parametrize("name", tiers({name: kept(axes) for name, axes in RECIPES.items()}))
def test_every_recipe_resumes_within_a_rollout_with_equal_bits(name, tmp_path):
    straight = stepping.run(specification(tmp_path / "straight", name))
    spec = specification(tmp_path / "stopped", name)
    assert not torch.equal(stepping.run(spec, stop=4), straight)
    assert torch.equal(stepping.run(spec, resume=True), straight)


def test_two_epochs_over_a_rollout_with_lora_resume_with_equal_bits(tmp_path):
    more = {"update": {"mini_batches": 1, "epochs": 3}, "lora": True}
    spec = specification(tmp_path / "straight", "recipe grpo", **more)
    spec["algorithm"]["reference"] = "adapter_off"
    straight = stepping.run(spec)
    other = {**spec, "output_dir": str(tmp_path / "stopped")}
    stepping.run(other, stop=4)
    assert torch.equal(stepping.run(other, resume=True), straight)


def test_two_processes_resume_with_equal_bits(tmp_path):
    names = ("everything", "filtered")
    straight = {name: specification(tmp_path / f"{name} a", name) for name in names}
    stopped = {name: specification(tmp_path / f"{name} b", name) for name in names}
    expected = stepping.finish(stepping.start(straight, tmp_path / "1", processes=2), tmp_path / "1")
    stepping.finish(stepping.start(stopped, tmp_path / "2", processes=2, stop=4), tmp_path / "2")
    found = stepping.finish(stepping.start(stopped, tmp_path / "3", processes=2, resume=True), tmp_path / "3")
    for name in names:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("name", ["recipe grpo", "recipe ppo", "recipe second_chance", "filtered"])
def test_a_run_killed_with_sigkill_resumes_with_equal_bits(name, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 30}
    spec = specification(tmp_path / "killed", name)
    spec["training"] |= saving
    straight = specification(tmp_path / "straight", name)
    straight["training"] |= {"max_steps": 30}
    out = Path(spec["output_dir"])
    (process,) = stepping.start({"run": spec}, tmp_path / "first")
    until((out / "checkpoint-5").exists, 200)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    found = checkpoint_manifest.verify(checkpoint_manifest.newest(out))
    assert 0 < found["step"] < 30
    assert torch.equal(stepping.run(spec, resume=True), stepping.run(straight))


def test_a_run_killed_in_the_middle_of_an_episode_resumes_with_equal_bits(tmp_path, monkeypatch):
    """12 episodes of 4 turns make a rollout of 3 steps: turn 112 is in the middle of the third."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    made = [specification(tmp_path / folder, "forks") for folder in ("killed", "straight")]
    for spec in made:
        spec["training"] |= saving
    killed, straight = made
    out = Path(killed["output_dir"])
    with monkeypatch.context() as patch:
        patch.setenv("KILLED_AT_TURN", "112")
        patch.setenv("KILLED_AFTER", str(out / "checkpoint-6" / checkpoint_manifest.MANIFEST))
        (process,) = stepping.start({"run": killed}, tmp_path / "first")
        assert process.wait(scaled(200)) == -signal.SIGKILL
    assert checkpoint_manifest.newest(out).name == "checkpoint-6"
    stepping.finish(stepping.start({"killed": killed}, tmp_path / "again", resume=True), tmp_path / "again")
    stepping.finish(stepping.start({"straight": straight}, tmp_path / "whole"), tmp_path / "whole")
    both = [Path(spec["output_dir"]) / "checkpoint-9" / "model.safetensors" for spec in made]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in both}) == 1


@pytest.mark.parametrize("name", EPISODES)
def test_episodes_resume_within_a_rollout_with_equal_bits(name, tmp_path):
    straight = stepping.run(specification(tmp_path / "straight", name))
    spec = specification(tmp_path / "stopped", name)
    assert not torch.equal(stepping.run(spec, stop=4), straight)
    assert torch.equal(stepping.run(spec, resume=True), straight)


def test_a_damaged_checkpoint_is_passed_over_and_an_older_one_taken(tmp_path, caplog):
    spec = specification(tmp_path, "recipe grpo")
    spec["training"] |= {"save_strategy": "steps", "save_steps": 3}
    straight = stepping.run(spec)
    out = Path(spec["output_dir"])
    weights = out / "checkpoint-9" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (out / "checkpoint-6" / checkpoint_manifest.MANIFEST).unlink()
    assert checkpoint_manifest.newest(out).name == "checkpoint-3"
    assert "hash differs" in caplog.text
    assert "never completed" in caplog.text
    with pytest.raises(checkpoint_manifest.CheckpointError, match="differs from the manifest"):
        stepping.run(spec, resume=str(out / "checkpoint-9"))
    assert torch.equal(stepping.run(spec, resume=True), straight)


def test_a_checkpoint_of_another_algorithm_is_refused_with_the_difference(tmp_path):
    spec = specification(tmp_path, "recipe grpo")
    stepping.run(spec, stop=3)
    spec["algorithm"]["kl"] = [{"use": "in_loss", "estimator": "k3", "beta": 0.7}]
    with pytest.raises(checkpoint_manifest.CheckpointError, match=r"kl\.0\.beta: 0\.04 in the checkpoint, 0\.7 now"):
        stepping.run(spec, resume=True)


def test_without_a_checkpoint_resuming_says_so(tmp_path):
    with pytest.raises(checkpoint_manifest.CheckpointError, match="nothing to resume"):
        stepping.run(specification(tmp_path, "recipe grpo"), resume=True)


def test_a_checkpoint_holds_the_policy_as_plain_transformers_and_no_pickled_code(tmp_path):
    from transformers import AutoModelForCausalLM

    spec = specification(tmp_path, "recipe ppo")
    stepping.run(spec, stop=4)
    folder = Path(spec["output_dir"]) / "checkpoint-4"
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert (folder / "critic" / "model.safetensors").is_file()
    manifest = json.loads((folder / checkpoint_manifest.MANIFEST).read_text())
    assert manifest["step"] == 4
    assert load_state(folder, 0)["buffer"] is not None
    shutil.rmtree(folder)


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    spec = specification(tmp_path, "recipe grpo")
    finished = stepping.run(spec, stop=9)
    assert torch.equal(stepping.run(spec, resume=True), finished)
    assert torch.equal(stepping.run(spec, resume=True), finished)


def test_a_changed_learning_rate_is_refused_and_a_longer_run_is_not(tmp_path):
    spec = specification(tmp_path, "recipe grpo")
    stepping.run(spec, stop=3)
    changed = {**spec, "training": {**spec["training"], "learning_rate": 0.5}}
    with pytest.raises(
        checkpoint_manifest.CheckpointError, match=r"training\.learning_rate: 0\.01 in the checkpoint, 0\.5 now"
    ):
        stepping.run(changed, resume=True)
    longer = {**spec, "training": {**spec["training"], "max_steps": 12}}
    trainer = stepping.make_trainer(longer)
    assert trainer.train(resume_from_checkpoint=True).global_step == 12


def test_rotation_keeps_the_checkpoint_that_was_just_written(tmp_path):
    spec = specification(tmp_path, "recipe grpo")
    spec["training"] |= {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    out = Path(spec["output_dir"])
    stepping.run(spec, stop=3)
    shutil.copytree(out / "checkpoint-3", out / "checkpoint-99")
    (out / "checkpoint-99" / checkpoint_manifest.MANIFEST).unlink()
    stepping.run(spec, resume=True)
    assert checkpoint_manifest.newest(out).name == "checkpoint-9"


def test_an_adapter_starts_from_the_seed_whatever_came_before(tmp_path):
    weights = []
    for history in (0, 5):
        torch.rand(history)
        trainer = stepping.make_trainer({**specification(tmp_path, "recipe grpo"), "lora": True})
        weights.append(torch.cat([p.flatten() for n, p in trainer.model.named_parameters() if "lora_" in n]))
    assert torch.equal(*weights)
