"""What a run on an adapter leaves behind: a whole model where `model.save_merged` asks for it, adapters in checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf.cli.runs.run import check
from hf_rlhf.config.pipeline import load_pipeline
from hf_rlhf.config.recipe import resolve
from hf_rlhf.modeling.lora_merge import merged
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.parallel import state_dict
from hf_rlhf.training.setup import AlgorithmError
from tests.helpers import offline_runs as off
from tests.helpers import runs, stage_runs

peft = pytest.importorskip("peft")

IDS = torch.tensor([[40, 41, 42, 50], [60, 61, 45, 33]])


def model(folder: Path, **more: Any) -> dict[str, Any]:
    """A model section over the tiny policy on disk."""
    if not (folder / "model").is_dir():
        off.save_model(folder / "model", dtype=torch.float32)
    return {"path": str(folder / "model"), "lora": {"r": 4}, **more}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(folder: Path) -> Any:
    """The model of a folder by transformers alone."""
    from transformers import AutoModelForCausalLM

    found, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer after two steps with checkpoints after each, its model saved as at the end of a run, and the folder."""
    folder = tmp_path_factory.mktemp("merged")
    options = {"learning_rate": 5.0, "save_strategy": "steps", "save_steps": 1}
    made = runs.trained(
        folder / "out", model=model(folder, save_merged=True), training=options, update={"mini_batches": 2, "ema": 0.5}
    )
    made.before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.save_model()
    return made, folder


def test_the_whole_model_loads_without_peft_and_gives_the_same(run):
    made, folder = run
    assert not list((folder / "out").glob("adapter_*"))
    whole = loaded(folder / "out")
    assert not any("lora" in name for name, _ in whole.named_parameters())
    assert (logits(whole) - logits(made.model)).abs().max() < 1e-5
    assert (logits(loaded(folder / "model")) - logits(made.model)).abs().max() > 1e-3


def test_the_adapter_lies_within_it(run):
    made, folder = run
    adapted = peft.PeftModel.from_pretrained(loaded(folder / "model"), folder / "out" / "adapter")
    assert torch.equal(logits(adapted), logits(made.model))


def test_the_model_in_memory_is_not_touched(run):
    made, _ = run
    assert all(torch.equal(p, made.before[name]) for name, p in made.model.named_parameters())
    assert hasattr(made.model, "peft_config")


def test_checkpoints_hold_the_adapter_alone(run):
    _, folder = run
    for step in (1, 2):
        assert (folder / "out" / f"checkpoint-{step}" / "adapter_model.safetensors").is_file()
        assert not (folder / "out" / f"checkpoint-{step}" / "model.safetensors").exists()


def test_the_average_is_whole_as_well(run):
    made, folder = run
    with made.ema.as_policy(made.model):
        expected = logits(made.model)
    assert (logits(loaded(folder / "out" / "ema")) - expected).abs().max() < 1e-5
    assert (expected - logits(made.model)).abs().max() > 1e-4


def test_a_run_goes_on_from_an_adapter_with_equal_bits(run):
    made, folder = run
    again = runs.trainer(
        folder / "out",
        model=model(folder),
        training={"learning_rate": 5.0, "save_strategy": "steps", "save_steps": 1},
        update={"mini_batches": 2, "ema": 0.5},
    )
    again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-1"))
    again.close()
    assert torch.equal(runs.parameters(again), runs.parameters(made))


def test_without_the_setting_the_adapter_is_what_is_left(tmp_path):
    made = runs.trained(tmp_path / "out", model=model(tmp_path), training={"learning_rate": 5.0})
    made.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("target", [["lm_head"], ["embed_tokens", "q_proj"]])
def test_a_head_that_shares_the_embeddings_weights_gets_its_own(target, tmp_path):
    policy = tiny_policy()[0]
    policy.config.tie_word_embeddings = True
    policy.tie_weights()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=target, init_lora_weights=False)
    adapted = peft.get_peft_model(policy, config)
    merged(adapted, state_dict(adapted)).save_pretrained(tmp_path)
    assert (logits(loaded(tmp_path)) - logits(adapted)).abs().max() < 1e-5
    assert policy.config.tie_word_embeddings


def test_without_an_adapter_the_setting_is_refused(tmp_path):
    raw = {**runs.BASE, "rollout": runs.SAMPLED, "model": {"save_merged": True}}
    with pytest.raises(UserError, match=r"model\.save_merged requires an adapter: set model\.lora"):
        check(resolve(raw))
    with pytest.raises(UserError, match=r"model\.save_merged requires"):
        check(off.recipe(tmp_path, "reward_model", "model.save_merged=false"))


def test_learned_prompts_are_refused_before_the_model_loads(tmp_path):
    learned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    from transformers import TrainingArguments

    from hf_rlhf import RLHFTrainer

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    recipe = runs.recipe(model={"path": "no/such/model", "save_merged": True})
    with pytest.raises(AlgorithmError, match=r"got PromptTuningConfig"):
        RLHFTrainer(None, recipe, args, train_dataset=runs.problems(), peft_config=learned)
    adapted = peft.get_peft_model(tiny_policy()[0], learned)
    with pytest.raises(ValueError, match="cannot be merged"):
        merged(adapted, state_dict(adapted))


# Runs without rollouts, and stages


def test_a_run_without_rollouts_leaves_both_or_the_adapter_alone(tmp_path):
    from transformers import AutoModelForSequenceClassification

    off.run(tmp_path, "reward_model", "model.lora={r: 2}", "training.max_steps=2")
    off.run(
        tmp_path, "reward_model", "model.lora={r: 2}", "training.max_steps=2", "model.save_merged=false", out="adapter"
    )
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float64)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1, dtype=torch.float64)
    for folder in (tmp_path / "out" / "adapter", tmp_path / "adapter"):
        adapted = peft.PeftModel.from_pretrained(plain, folder)
        assert (logits(adapted) - logits(whole)).abs().max() < 1e-9
        plain = adapted.unload()


def test_a_stage_goes_on_from_what_a_stage_on_an_adapter_merged(tmp_path):
    given = stage_runs.stages(tmp_path)
    given["ppo"]["set"] |= {"model.lora": {"r": 2}, "model.save_merged": True, "training.max_steps": 2}
    pairs = str(tmp_path / "pairs.jsonl")
    given["dpo"] = {
        "recipe": "dpo",
        "set": {**stage_runs.STEPS, "training.max_steps": 1, "model.path": "stage:ppo", "dataset.path": pairs},
    }
    for name in ("sft", "rm"):
        given[name]["set"] |= {"model.lora": {"r": 2}, "training.max_steps": 1}
    given["dpo"]["set"] |= {"model.lora": {"r": 2}, "training.per_device_train_batch_size": 4}
    stage_runs.run(tmp_path, given=given)
    out = tmp_path / "out"
    started = loaded(out / "ppo")
    adapted = peft.PeftModel.from_pretrained(loaded(out / "sft"), out / "ppo" / "adapter")
    assert (logits(adapted) - logits(started)).abs().max() < 1e-5
    base = peft.PeftConfig.from_pretrained(out / "dpo" / "adapter").base_model_name_or_path
    assert Path(base) == out / "ppo"
    loaded(out / "dpo")


def test_a_stage_that_needs_a_whole_model_is_refused_an_adapter(tmp_path):
    given = stage_runs.stages(tmp_path)
    given["ppo"]["set"]["model.lora"] = {"r": 2}
    given["dpo"] = {"recipe": "dpo", "set": {"model.path": "stage:ppo"}}
    with pytest.raises(UserError, match=r"stage:ppo leaves only an adapter.*set ppo\.model\.save_merged=true"):
        load_pipeline(stage_runs.write(tmp_path, given))
    given["rm"]["set"] |= {"model.lora": {"r": 2}, "model.save_merged": False}
    given["dpo"]["set"]["model.path"] = "stage:sft"
    with pytest.raises(
        UserError, match=r"stage:rm leaves only an adapter, and rewards\.reward_model reads a whole model"
    ):
        load_pipeline(stage_runs.write(tmp_path, given))


def test_adapter_off_without_an_adapter_is_refused_before_the_model_loads(tmp_path):
    from tests.helpers import dpo_runs

    recipe = dpo_runs.recipe(tmp_path, "trainer.reference=adapter_off")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path="no/such/model"))
    with pytest.raises(UserError, match=r"trainer\.reference=adapter_off needs an adapter\. Set model\.lora"):
        check(recipe)
