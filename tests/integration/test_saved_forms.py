"""An output folder to which a whole model is saved after an adapter, or the other way round; and merges that fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hf_rlhf.modeling.lora_merge import drop_other_form, save_merged
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.parallel import state_dict
from tests.helpers import offline_runs as off
from tests.helpers import runs
from tests.integration.test_lora_saving import loaded, logits, model

peft = pytest.importorskip("peft")

WHOLE = ("config.json", "generation_config.json", "model.safetensors", "adapter")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer after two steps with an average, and its folder, to which nothing is saved yet but checkpoints."""
    folder = tmp_path_factory.mktemp("forms")
    options = {"learning_rate": 5.0, "save_strategy": "steps", "save_steps": 1}
    made = runs.trained(folder / "out", model=model(folder), training=options, update={"mini_batches": 2, "ema": 0.5})
    return made, folder


def save(made, merge: bool) -> None:
    sections = made.parts.sections
    sections["model"] = dataclasses.replace(sections["model"], save_merged=merge)
    made.save_model()


def adapted(folder: Path, within: Path):
    return peft.PeftModel.from_pretrained(loaded(folder / "model"), within)


def test_a_whole_model_after_an_adapter_and_an_adapter_after_it(run):
    made, folder = run
    out = folder / "out"
    with made.ema.as_policy(made.model):
        expected = {out: None, out / "ema": logits(made.model)}
    expected[out] = logits(made.model)
    save(made, False)
    assert all((place / "adapter_model.safetensors").is_file() for place in expected)
    save(made, True)
    for place, of_model in expected.items():
        assert not list(place.glob("adapter_*")), "the adapter would be applied once more"
        assert (logits(loaded(place)) - of_model).abs().max() < 1e-5
    save(made, False)
    for place, of_model in expected.items():
        assert not [name for name in WHOLE if (place / name).exists()]
        assert torch.equal(logits(adapted(folder, place)), of_model)
    assert (out / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_what_is_saved_again_to_be_pushed_has_the_same_form(run):
    """Trainer's `push_to_hub` saves by an internal call without a folder, checkpoints name theirs."""
    made, folder = run
    save(made, True)
    made.save_model(_internal_call=True)
    assert not list((folder / "out").glob("adapter_*"))
    assert (logits(loaded(folder / "out")) - logits(made.model)).abs().max() < 1e-5
    made.save_model(str(folder / "checkpoint-9"), _internal_call=True)
    assert (folder / "checkpoint-9" / "adapter_config.json").is_file()
    assert not (folder / "checkpoint-9" / "model.safetensors").exists()


def test_a_run_without_rollouts_goes_on_in_the_other_form(tmp_path):
    from transformers import AutoModelForSequenceClassification

    words = ["model.lora={r: 2}", "training.max_steps=2", "training.save_strategy=steps", "training.save_steps=2"]
    out = tmp_path / "out"
    off.run(tmp_path, "reward_model", *words, "model.save_merged=false")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1, dtype=torch.float64)
    expected = logits(peft.PeftModel.from_pretrained(plain, out))
    off.run(tmp_path, "reward_model", *words, resume=True)
    assert not list(out.glob("adapter_*"))
    whole = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float64)
    assert (logits(whole) - expected).abs().max() < 1e-9
    off.run(tmp_path, "reward_model", *words, "model.save_merged=false", resume=True)
    assert not [name for name in WHOLE if (out / name).exists()]


def test_an_adapter_beside_its_own_base_leaves_the_base(tmp_path):
    policy = tiny_policy()[0]
    policy.save_pretrained(tmp_path)
    policy.name_or_path = str(tmp_path)
    given = peft.get_peft_model(policy, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    given.save_pretrained(tmp_path)
    drop_other_form(tmp_path, whole=False)
    assert (tmp_path / "model.safetensors").is_file()
    given.save_pretrained(tmp_path / "adapter")
    drop_other_form(tmp_path, whole=False)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_merge_that_fails_leaves_the_adapter(run, tmp_path):
    learned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompts = peft.get_peft_model(tiny_policy()[0], learned)
    with pytest.raises(ValueError, match="cannot be merged"):
        save_merged(prompts, tmp_path / "alone", state_dict=state_dict(prompts))
    made, _ = run
    own, sections = made.model, made.parts.sections
    sections["model"] = dataclasses.replace(sections["model"], save_merged=True)
    made.model = prompts
    try:
        with pytest.raises(ValueError, match="cannot be merged"):
            made.save_model(str(tmp_path / "run"))
    finally:
        made.model = own
    for name in ("alone", "run"):
        assert (tmp_path / name / "adapter" / "adapter_model.safetensors").is_file()
