"""Adapters of every method and target, on tied and untied models: all ways of computing see them, and none is lost on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.adapters import AdapterError, adapted_model_problems, add_adapter, config_problems
from hf_rlhf.data.model_loading import ModelError, load_config, load_model
from hf_rlhf.modeling.lora_merge import merged
from hf_rlhf.modeling.policy import ActorCritic, why_not_packed
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.training.parallel import state_dict
from plugins.rollout._checks import unserved
from tests.helpers.adapters import CASES, TARGETS, adapted, base, base_of, logits

peft = pytest.importorskip("peft")

ROWS = [[5, 6, 7], [5, 6, 7], [40, 41]], [[8, 9, 10, 11], [12], [13, 14, 6]]


def gradients(model: Any, attention: Any, fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs (n,) of `ROWS` under a model, and the gradient of the sum of their squares by each trained parameter."""
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    batch = TokenBatch(*ROWS, mask, 0, attention)
    derivative = (lambda values, part: {"logps": 2 * values["logps"]}) if fused else None
    found = ActorCritic(model, None, 1.0)(batch, derivative=derivative)
    (found["loss"] if "loss" in found else found["logps"].square().sum()).backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found["logps"].detach()[mask.bool()], named


def by_hand(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from the model's own logits, row by row."""
    logps = []
    for prompt, completion in zip(*ROWS, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        all_of_it = model(ids).logits[0].log_softmax(-1)
        logps.append(all_of_it[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0])
    found = torch.cat(logps)
    found.square().sum().backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found.detach(), named


@pytest.mark.parametrize(("method", "target", "tied"), CASES)
def test_every_way_of_computing_sees_the_adapter(method: str, target: str, tied: bool):
    model = adapted(base_of(target, tied), method, target)
    logps, due = by_hand(model)
    assert any(grad.abs().max() > 1e-6 for grad in due.values())
    assert why_not_packed(model) is None
    for attention in ("packed", "padded"):
        for fused in (True, False):
            found, named = gradients(model, attention, fused)
            torch.testing.assert_close(found, logps, atol=1e-5, rtol=0)
            assert named.keys() == due.keys()
            for name in due:
                torch.testing.assert_close(named[name], due[name], atol=1e-4, rtol=1e-3)
    assert unserved(model, torch.device("cpu"), 16) is None
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base_of(target, tied)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("method", "target", "tied"), CASES)
def test_what_is_saved_is_loaded_as_the_same_policy(method: str, target: str, tied: bool, tmp_path: Path):
    plain = base_of(target, tied)
    plain.save_pretrained(tmp_path / "base")
    plain.name_or_path = str(tmp_path / "base")
    start = logits(plain)
    model = adapted(plain, method, target)
    due = logits(model)
    assert (due - start).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    merged(model, state_dict(model)).save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(model), due)
    for form in ("adapter", "merged"):
        again = load_model(Model(path=str(tmp_path / form)))
        assert (logits(again) - due).abs().max() < 1e-5
        assert again.config.tie_word_embeddings == (
            again.get_input_embeddings().weight is again.get_output_embeddings().weight
        )
        assert all(p.requires_grad for p in again.parameters())
    assert tied <= (model.get_base_model().config.tie_word_embeddings or target != "linear")


def test_an_adapter_on_an_adapter_has_that_as_its_base(tmp_path: Path):
    base(True).save_pretrained(tmp_path / "base")
    for name, before, target in (("first", "base", "head"), ("second", "first", "linear")):
        model = adapted(load_model(Model(path=str(tmp_path / before))), "lora", target)
        model.save_pretrained(tmp_path / name)
    assert (logits(load_model(Model(path=str(tmp_path / "second")))) - logits(model)).abs().max() < 1e-5


def test_dora_starts_at_the_base_though_a_row_is_zeros():
    config = peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["embed_tokens", "lm_head"])
    model = add_adapter(base(True), config)
    assert (model.get_base_model().get_input_embeddings().weight[0] == 0).all()
    torch.testing.assert_close(logits(model), logits(base(True)))
    _, named = gradients(model, "packed", True)
    assert all(x.isfinite().all() for x in named.values())


@pytest.mark.parametrize("target", ["linear", "head", "embedding", "whole embedding"])
def test_a_vocabulary_that_was_resized_is_so_when_loaded_again(target: str, tmp_path: Path):
    base(True).save_pretrained(tmp_path / "base")
    model = load_model(Model(path=str(tmp_path / "base")))
    model.resize_token_embeddings(103, mean_resizing=False)
    model = adapted(model, "lora", target)
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(Model(path=str(tmp_path / "adapter")))
    assert (logits(again) - logits(model)).abs().max() < 1e-5
    assert again.config.vocab_size == 103


@pytest.mark.parametrize(
    ("kind", "config"),
    {
        "IA3Config": {"target_modules": ["q_proj"], "feedforward_modules": []},
        "PromptTuningConfig": {"num_virtual_tokens": 2},
        "PrefixTuningConfig": {"num_virtual_tokens": 2},
        "PromptEncoderConfig": {"num_virtual_tokens": 2},
        "LoHaConfig": {},
        "LoKrConfig": {},
        "OFTConfig": {},
        "BOFTConfig": {},
        "VeraConfig": {},
        "AdaLoraConfig": {"total_step": 10},
        "LNTuningConfig": {},
        "TrainableTokensConfig": {"token_indices": [1]},
    }.items(),
)
def test_other_tuners_are_refused_by_name(kind: str, config: dict[str, Any]):
    other = getattr(peft, kind)(task_type="CAUSAL_LM", **config)
    (problem,) = config_problems(other)
    assert f"got {kind} (" in problem
    assert "Use peft.LoraConfig(r=16" in problem
    with pytest.raises(AdapterError, match=kind):
        add_adapter(base(False), other)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"init_lora_weights": "pissa"}, "got 'pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "got 'olora'"),
        ({"bias": "all"}, "bias of LoraConfig must be 'none', got 'all'"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication of LoraConfig must be None"),
        ({"lora_bias": True}, "lora_bias of LoraConfig must be False"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens of LoraConfig must be None"),
        ({**TARGETS["experts"], "use_dora": True}, "use_dora does not work with target_parameters"),
    ],
)
def test_variants_that_change_the_base_or_its_graph_are_refused(config: dict[str, Any], said: str):
    made = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **config})
    assert any(said in problem for problem in config_problems(made))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["q_prj"]}, r"does not fit LlamaForCausalLM: Target modules .*q_prj.* not found"),
        (
            {"trainable_token_indices": [5, 500], "target_modules": ["q_proj"]},
            r"below 99, the rows of the embedding, got \[500\]",
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [-1]}, "target_modules": ["q_proj"]},
            r"rows of embed_tokens, got \[-1\]",
        ),
        (
            {"trainable_token_indices": {"self_attn": [1]}, "target_modules": ["q_proj"]},
            "must name an embedding such as embed_tokens, got self_attn",
        ),
        (
            {"trainable_token_indices": {"input_layernorm": [1]}, "target_modules": ["q_proj"]},
            "must name an embedding such as embed_tokens, got input_layernorm",
        ),
        ({"target_modules": ["lm_head"], "trainable_token_indices": [5]}, "lm_head must have one adapter, got two"),
        (
            {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
            "ensure_weight_tying works with modules_to_save",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(config: dict[str, Any], said: str):
    with pytest.raises(AdapterError, match=said):
        add_adapter(base(True), peft.LoraConfig(task_type="CAUSAL_LM", **config))


def test_models_that_cannot_be_trained_or_loaded_again_are_refused(tmp_path: Path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(base(False), config)
    assert not list(adapted_model_problems(model))
    assert "one adapter" in next(adapted_model_problems(peft.get_peft_model(base(False), config, adapter_name="mine")))
    model.save_pretrained(tmp_path)
    (frozen,) = adapted_model_problems(peft.PeftModel.from_pretrained(base(False), tmp_path))
    assert "is_trainable=True" in frozen
    injected = base(False)
    injected.add_adapter(config)
    assert "get_peft_model" in next(adapted_model_problems(injected))
    for load in (load_model, lambda settings: load_config(settings.path, local_files_only=True)):
        with pytest.raises(ModelError, match="adapter without its base: set base_model_name_or_path"):
            load(Model(path=str(tmp_path)))


def test_a_folder_with_another_tuner_or_another_base_is_refused(tmp_path: Path):
    for name, layers in (("base", 2), ("larger", 3)):
        base(False, num_hidden_layers=layers).save_pretrained(tmp_path / name)
    other = load_model(Model(path=str(tmp_path / "base")))
    peft.get_peft_model(other, peft.LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "loha")
    with pytest.raises(ModelError, match=r"loha: the adapter must be LoRA.*got LoHaConfig"):
        load_model(Model(path=str(tmp_path / "loha")))
    own = load_model(Model(path=str(tmp_path / "base")))
    adapted(own, "lora", "head").save_pretrained(tmp_path / "base")
    for load in (load_model, lambda settings: load_config(settings.path, local_files_only=True)):
        with pytest.raises(ModelError, match="both an adapter and its base"):
            load(Model(path=str(tmp_path / "base")))
    config = (
        (tmp_path / "base" / "adapter_config.json")
        .read_text()
        .replace(str(tmp_path / "base"), str(tmp_path / "larger"))
    )
    (tmp_path / "base" / "adapter_config.json").write_text(config)
    with pytest.raises(ModelError, match=r"does not fit its base .*larger: Found missing adapter keys"):
        load_model(Model(path=str(tmp_path / "base")))
