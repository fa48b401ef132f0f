"""Runs on adapters of every target: RL, SFT and DPO train them, resume bit-identically, and leave the same policy on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import load_model
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.setup import AlgorithmError
from tests.helpers import adapters, runs
from tests.helpers import dpo_runs as dpo
from tests.helpers import sft_runs as sft
from tests.helpers.adapters import METHODS, TARGETS, base_of, logits

peft = pytest.importorskip("peft")

RUNS = [
    ("lora", "head", True),
    ("lora", "embedding", True),
    ("dora", "both ends", True),
    ("rslora", "head", False),
    ("dora", "embedding", False),
    ("lora", "tokens", True),
    ("lora", "tokens", False),
    ("lora", "both ends whole", True),
    ("dora", "whole embedding", False),
    ("lora", "experts", False),
    ("rslora", "experts", True),
]
FEW = [RUNS[i] for i in (0, 2, 3, 5, 7, 9)]
"""Each method and each kind of target once."""
TIERS = [*FEW, *(pytest.param(*run, marks=pytest.mark.slow) for run in RUNS if run not in FEW)]


def save(folder: Path, target: str, tied: bool) -> str:
    """The base of a case with its tokenizer."""
    base_of(target, tied).save_pretrained(folder)
    tiny_policy()[1].save_pretrained(folder)
    return str(folder)


def again(folder: Path) -> torch.Tensor:
    """The logits of the policy that `--model FOLDER` starts from."""
    return logits(load_model(Model(path=str(folder))))


@pytest.mark.parametrize(("method", "target", "tied"), TIERS)
def test_a_run_resumes_with_equal_bits_and_is_loaded_again(method: str, target: str, tied: bool, tmp_path: Path):
    path = save(tmp_path / "base", target, tied)
    lora = {"r": 4, **METHODS[method], **TARGETS[target]}
    training = {"learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    parts: dict[str, Any] = {"update": {"mini_batches": 2, "ema": 0.5}, "kl": [{"use": "in_loss"}]}
    parts |= {"reference": "adapter_off", "training": training}
    whole = None
    for form, merge in (("adapter", False), ("merged", True)):
        model = {"path": path, "lora": lora, "save_merged": merge}
        made = runs.trainer(tmp_path / form, model=model, **parts)
        start = logits(made.model)
        made.train(resume_from_checkpoint=str(tmp_path / "adapter" / "checkpoint-1") if merge else None)
        assert whole is None or torch.equal(logits(made.model), whole)
        whole = logits(made.model)
        assert (whole - start).abs().max() > 1e-4
        made.save_model()
        made.close()
        assert (again(tmp_path / form) - whole).abs().max() < 1e-5
        with made.ema.as_policy(made.model):
            average = logits(made.model)
        assert (again(tmp_path / form / "ema") - average).abs().max() < 1e-5


@pytest.mark.parametrize(("method", "target", "tied"), FEW)
def test_a_copy_of_the_policy_is_its_reference_and_does_not_learn(method: str, target: str, tied: bool, tmp_path: Path):
    model = {"path": save(tmp_path / "base", target, tied), "lora": {"r": 4, **METHODS[method], **TARGETS[target]}}
    made = runs.trainer(tmp_path / "out", model=model, kl=[{"use": "in_loss"}], reference="frozen")
    start = logits(made.model)
    made.train()
    made.close()
    assert torch.equal(logits(made.collector.forwards.reference.own), start)
    assert not torch.equal(logits(made.model), start)


def words(path: str, method: str, target: str) -> list[str]:
    """Overrides for a recipe without rollouts."""
    lora = json.dumps({"r": 4, **METHODS[method], **TARGETS[target]})
    return [f"model.path={path}", f"model.lora={lora}", "model.dtype=float32"]


@pytest.mark.parametrize(("method", "target", "tied"), TIERS)
def test_sft_trains_what_the_model_computes(method: str, target: str, tied: bool, tmp_path: Path):
    given = words(save(tmp_path / "base", target, tied), method, target)
    made = sft.made(tmp_path, *given, "training.max_steps=3")
    batch = moved(made, 4)
    found = made.compute_loss(made.model, dict(batch))
    labels = batch["labels"][:, 1:]
    outputs = made.model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
    each = outputs.logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    due = -each[labels != -100].mean()
    torch.testing.assert_close(found, due)
    own = trained(made.model)
    pairs = zip(*(torch.autograd.grad(loss, own.values(), allow_unused=True) for loss in (found, due)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    trained_and_saved(made, tmp_path)


@pytest.mark.parametrize(("method", "target", "tied"), TIERS)
def test_dpo_compares_what_the_model_computes_with_its_base(method: str, target: str, tied: bool, tmp_path: Path):
    given = words(save(tmp_path / "base", target, tied), method, target)
    made = dpo.made(tmp_path, *given, "training.max_steps=3")
    batch = moved(made, 4)
    for logps, model in ((made.policy(batch), made.model), (made.reference(batch), base_of(target, tied))):
        ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
        with torch.no_grad():
            outputs = model.eval()(input_ids=ids, attention_mask=batch["attention_mask"])
        each = outputs.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.cat(logps).detach(), (each * mask).sum(1), atol=1e-4, rtol=1e-5)
    trained_and_saved(made, tmp_path)


def moved(made: Any, rows: int) -> dict[str, Any]:
    """The first rows of a trainer in one batch, after its adapter was changed at random."""
    adapters.moved(made.model)
    return dict(made._prepare_inputs(made.data_collator(list(made.train_dataset)[:rows])))


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_and_saved(made: Any, folder: Path) -> None:
    """Train and save: every trained parameter moves, and both forms on disk are the policy."""
    before = {name: p.detach().clone() for name, p in trained(made.model).items()}
    made.train()
    assert not [name for name, p in trained(made.model).items() if torch.equal(p, before[name])]
    live = logits(made.model)
    made.save_model()
    made.close()
    assert (again(folder / "out") - live).abs().max() < 1e-5
    assert (again(folder / "out" / "adapter") - live).abs().max() < 1e-5


# What is refused before a model loads


@pytest.mark.parametrize("kind", ["IA3Config", "PromptTuningConfig", "LoHaConfig", "OFTConfig", "AdaLoraConfig"])
def test_another_tuner_is_refused_before_the_model_loads(kind: str, tmp_path: Path):
    from transformers import TrainingArguments

    from hf_rlhf import RLHFTrainer

    own = {"PromptTuningConfig": {"num_virtual_tokens": 2}, "AdaLoraConfig": {"total_step": 9}}.get(kind, {})
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **own)
    recipe = runs.recipe(model={"path": "no/such/model"})
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(AlgorithmError, match=rf"peft_config: the adapter must be LoRA.*got {kind}.*model\.lora="):
        RLHFTrainer(None, recipe, args, train_dataset=runs.problems(), peft_config=config)
    if kind != "AdaLoraConfig":
        other = peft.get_peft_model(tiny_policy()[0], config)
        with pytest.raises(AlgorithmError, match=f"model: the adapter must be LoRA.*got {kind}"):
            runs.trainer(tmp_path, policy=other)


def test_a_target_that_is_not_there_is_named(tmp_path: Path):
    path = save(tmp_path / "base", "linear", True)
    with pytest.raises(UserError, match=r"does not fit LlamaForCausalLM: Target modules .*q_prj"):
        runs.trainer(tmp_path, model={"path": path, "lora": {"target_modules": ["q_prj"]}})
    with pytest.raises(UserError, match=r"does not fit LlamaForCausalLM: .*q_prj"):
        sft.made(tmp_path, *words(path, "lora", "head"), "model.lora.target_modules=[q_prj]")
    with pytest.raises(AlgorithmError, match=r"model\.lora\.use_dora does not work with target_parameters"):
        runs.trainer(tmp_path, model={"path": "no/such/model", "lora": {"use_dora": True, **TARGETS["experts"]}})
