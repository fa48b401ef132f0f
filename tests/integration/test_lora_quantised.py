"""Bases in 4 and 8 bits: what is loaded, that rollout and update agree, what is saved, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_rlhf.cli.runs.run import check
from hf_rlhf.config.recipe import load_recipe, resolve
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import ModelError, load_model
from hf_rlhf.data.quantization import bytes_of
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.offline.memory_estimate import estimate_offline
from hf_rlhf.training.offline.model import load_with_head
from tests.helpers import dpo_runs as dpo
from tests.helpers import offline_runs as off
from tests.helpers import runs
from tests.integration.test_lora_saving import loaded, logits

pytest.importorskip("peft")

BITS = ["load_in_4bit", "load_in_8bit"]
GAE = {"advantages": "gae"}
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'hf_rlhf[quant]'"
)


def save(folder: Path) -> str:
    """A model of 64 hidden units, which is a block of 4-bit weights, and its tokenizer. Returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own, tokenizer = tiny_policy()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{**own.config.to_dict(), **sizes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(tmp_path_factory.mktemp("quantised") / "model")


def section(path: str, bits: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "lora": {"r": 4}, bits: True, **more}


def codes(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are held as codes."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.dtype.is_floating_point}


# What is loaded


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_the_base_is_held_in_few_bits_and_its_outputs_are_near(bits, path):
    whole, few = load_model(Model(path=path)), load_model(Model(**section(path, bits)))
    linear = sum(p.numel() for name, p in whole.named_parameters() if "_proj" in name)
    held = sum(p.nbytes for p in codes(few).values())
    assert held == linear * (0.5 if bits == "load_in_4bit" else 1)
    gap = (logits(few) - logits(whole)).norm() / logits(whole).norm()
    assert 1e-4 < gap < 0.3


@needs_library
@pytest.mark.parametrize(
    "chosen",
    [{"load_in_4bit": True}, {"load_in_4bit": True, "use_bnb_nested_quant": True}, {"load_in_8bit": True}],
    ids=str,
)
def test_the_plan_counts_its_bytes(chosen, path):
    settings = Model(path=path, **chosen)
    few = load_model(settings, lora=True)
    held = sum(p.nbytes for p in few.parameters())
    for module in few.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        elif "8bit" in type(module).__name__:
            held += module.weight.SCB.nbytes
    whole = load_model(Model(path=path))
    spared, layer = bytes_of(whole, settings)
    assert sum(p.nbytes for p in whole.parameters()) - spared == pytest.approx(held, rel=1e-3)
    assert layer == 4 * 64 * 128


@needs_library
@pytest.mark.parametrize(("name", "bits"), [("rm_token", "load_in_8bit"), ("dpo", "load_in_4bit")])
def test_the_plan_of_a_trainer_counts_its_bytes(name, bits, path):
    """Weights and a reference of its own next to the loaded model's, heads apart, which stay numbers."""
    from transformers import AutoTokenizer, TrainingArguments

    reference = ["trainer.reference=frozen"] if name == "dpo" else []
    settings = [f"model.path={path}", "model.dtype=float32", "model.lora={r: 2}", *reference]
    args = TrainingArguments("nowhere", use_cpu=True, report_to="none")
    whole, few = (load_recipe(name, [*settings, *more]) for more in ([], [f"model.{bits}=true"]))
    plans = [estimate_offline(made.model, made.trainer(), args, tokens=20) for made in (whole, few)]
    assert not plans[1].notes
    loaded = [
        load_with_head(made.model, made.trainer(), AutoTokenizer.from_pretrained(path), 0, False)
        for made in (whole, few)
    ]
    sizes = [sum(p.nbytes for p in model.parameters()) for model in loaded]
    linear = sum(p.numel() for name, p in loaded[0].named_parameters() if "_proj" in name and "lora" not in name)
    scales = linear / 16 if bits == "load_in_4bit" else 4 * sum(len(x) for x in codes(loaded[1]).values())
    for phase in ("evaluation", "update"):
        for part in ("weights", *(["reference"] if reference else [])):
            spared = (plans[0].phases[phase][part] - plans[1].phases[phase][part]) * MIB
            assert spared == pytest.approx(sizes[0] - sizes[1] - scales, rel=1e-6)
        assert plans[1].phases[phase]["one layer's weights"] * MIB == 4 * 64 * 128


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_evaluation_computes_as_training_does(bits, path):
    model = load_model(Model(**section(path, bits)))
    ids = torch.tensor([[40, 41, 42, 50]])
    with torch.inference_mode():
        assert torch.equal(model.eval()(ids).logits, model.train()(ids).logits)
    alone, beside = model.eval()(ids[:, :2]).logits, model(ids.repeat(3, 1)).logits[:1, :2]
    assert (alone - beside).abs().max() < 1e-5, "what else is computed changes nothing"


# What is trained and saved


@pytest.fixture(scope="module", params=BITS)
def run(request, path, tmp_path_factory):
    """A trainer after two steps over one rollout with a KL to the base and a critic on it, saved as at the end; its folder."""
    folder = tmp_path_factory.mktemp("run")
    made = trainer(folder, path, request.param)
    made.codes = codes(made.model)
    made.train()
    made.close()
    made.save_model()
    return made, folder


def trainer(folder: Path, path: str, bits: str) -> Any:
    recipe = {"kl": [{"use": "in_loss"}], "critic": {"use": "separate", "adapter": True, "coef": 1.0}, **GAE}
    return runs.trainer(
        folder,
        model=section(path, bits, save_merged=True),
        rollout=runs.SAMPLED,
        reference="adapter_off",
        training={"learning_rate": 1.0, "save_strategy": "steps", "save_steps": 1},
        update={"epochs": 2},
        **recipe,
    )


@needs_library
def test_a_run_trains_adapter_and_critic_on_codes_that_stay(run):
    made, _ = run
    assert made.codes
    assert all(torch.equal(x, made.codes[name]) for name, x in codes(made.model).items())
    assert any(p.abs().max() > 0 for name, p in made.model.named_parameters() if "lora_B" in name)
    assert made.actor_critic.critic.head.weight.abs().max() > 0
    shared = {p.data_ptr() for p in made.model.parameters() if not p.dtype.is_floating_point}
    assert {
        p.data_ptr() for p in made.actor_critic.critic.trunk.parameters() if not p.dtype.is_floating_point
    } <= shared


@needs_library
def test_the_update_meets_the_log_probs_of_the_rollout(run):
    first, second = runs.entries(run[0])
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert abs(second["policy/ratio"] - 1) > 1e-6


@needs_library
def test_the_merged_model_is_plain_and_gives_the_same(run):
    made, folder = run
    whole = loaded(folder)
    assert getattr(whole.config, "quantization_config", None) is None
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert (logits(whole) - logits(made.model)).abs().max() < 1e-5
    assert all(torch.equal(x, made.codes[name]) for name, x in codes(made.model).items())


@needs_library
def test_a_run_resumes_with_equal_bits(run, path):
    made, folder = run
    bits = "load_in_4bit" if made.parts.sections["model"].load_in_4bit else "load_in_8bit"
    again = trainer(folder, path, bits)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    again.close()
    assert torch.equal(runs.parameters(again), runs.parameters(made))


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_a_trainer_without_rollouts_trains_on_it_and_leaves_a_whole_model(bits, path, tmp_path):
    from transformers import AutoModelForSequenceClassification

    words = [
        f"model.path={path}",
        f"model.{bits}=true",
        "model.lora={r: 2}",
        "model.dtype=float32",
        "training.max_steps=1",
    ]
    dpo.run(tmp_path, *words, "trainer.reference=frozen")
    loaded(tmp_path / "out")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {x.dtype for x in adapter.values()} == {torch.float32}
    off.run(tmp_path, "reward_model", *words, out="rm")
    whole, notes = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not notes["missing_keys"]
    assert whole.score.weight.shape == (1, 64)


# What is refused, before anything is loaded

REFUSED = [
    ({"load_in_4bit": True}, {}, r"model\.load_in_4bit freezes the weights.*set model\.lora"),
    ({"load_in_8bit": True}, {}, r"model\.load_in_8bit freezes the weights.*set model\.lora"),
    ({"lora": {}, "load_in_4bit": True, "load_in_8bit": True}, {}, "are both set: drop one"),
    ({"lora": {}, "load_in_8bit": True, "use_bnb_nested_quant": True}, {}, "do nothing in 8 bits"),
    ({"lora": {}, "bnb_4bit_quant_type": "fp4"}, {}, r"set model\.load_in_4bit=true"),
    ({"lora": {}, "load_in_4bit": True, "dtype": "float64"}, {}, r"set model\.dtype=float32"),
    ({"lora": {}, "load_in_4bit": True}, {**GAE, "critic": "separate"}, r"critic=separate trains a copy.*adapter=true"),
    (
        {"lora": {}, "load_in_4bit": True},
        {"optimizer": "trpo", "policy_loss": "surrogate"},
        "optimizer=trpo takes second derivatives",
    ),
]


@pytest.mark.parametrize(("model", "parts", "reason"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_it_is_refused(model, parts, reason):
    raw = {**runs.BASE, "rollout": runs.SAMPLED, "model": {"path": "no/such/model", **model}, **parts}
    with pytest.raises(UserError, match=reason):
        check(resolve(raw))


def test_a_trainer_without_rollouts_refuses_it_as_well(tmp_path):
    recipe = off.recipe(tmp_path, "reward_model", "model.load_in_4bit=true", "model.dtype=float32")
    with pytest.raises(UserError, match=r"freezes the weights.*set model\.lora"):
        check(recipe)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    raw = {**runs.BASE, "rollout": runs.SAMPLED, "model": {"lora": {}, "load_in_4bit": True}}
    with pytest.raises(UserError, match=r"load_in_4bit requires bitsandbytes: pip install 'hf_rlhf\[quant\]'"):
        check(resolve(raw))


def test_an_adapters_folder_is_refused_as_a_quantised_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    raw = {**runs.BASE, "rollout": runs.SAMPLED, "model": section(str(tmp_path), "load_in_4bit")}
    with pytest.raises(UserError, match="holds an adapter, and quantising its base would change"):
        check(resolve(raw))


def test_a_model_that_is_loaded_already_is_refused(tmp_path):
    from transformers import TrainingArguments

    from hf_rlhf import RLHFTrainer

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    recipe = runs.recipe(model={"lora": {}, "load_in_4bit": True})
    with pytest.raises(ValueError, match="are for a model that is named"):
        RLHFTrainer(tiny_policy()[0], recipe, args, train_dataset=runs.problems())


@needs_library
def test_a_folder_that_is_quantised_itself_needs_an_adapter(path, tmp_path):
    load_model(Model(**section(path, "load_in_4bit"))).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"is quantised \(bitsandbytes\), so its weights cannot be trained: set model\.lora"
    ):
        load_model(Model(path=str(tmp_path)))
    assert codes(load_model(Model(path=str(tmp_path)), lora=True))
