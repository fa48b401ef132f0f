"""What is checked of a model: the number format of its weights, and a row of the embedding for each token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import ModelError
from hf_rlhf.modeling.policy import configure_padding, embedded_padding, pad_token_id
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.model_checks import (
    check_causal,
    check_trained,
    check_vocabulary,
    dtype_problems,
    dtype_remarks,
    known_model,
    lost_share,
)
from tests.helpers.decoding import other

STD = 0.02


class Arguments:
    learning_rate = 1e-6


@pytest.mark.parametrize("rate", [1e-6, 1e-5, 1e-4])
def test_the_share_of_lost_updates_lies_between_the_bounds(rate):
    draw = torch.Generator().manual_seed(0)
    weights = (torch.randn(200_000, generator=draw) * STD).bfloat16()
    lost = float(((weights.float() + rate).bfloat16() == weights).double().mean())
    assert lost_share(rate, STD, 9) - 5e-3 <= lost <= lost_share(rate, STD, 8) + 5e-3


def test_a_plan_says_what_bfloat16_weights_do_at_this_learning_rate():
    (said,) = dtype_remarks("bfloat16", False, Arguments())
    assert "training.learning_rate=1e-06" in said
    assert f"lose {lost_share(1e-6, STD, 9):.1%} to {lost_share(1e-6, STD, 8):.1%}" in said
    assert "Set model.dtype=float32 with training.bf16=true" in said
    for dtype, lora in (("bfloat16", True), ("float32", False), ("float64", False), (None, False)):
        assert list(dtype_remarks(dtype, lora, Arguments())) == []


def test_float16_is_refused_unless_an_adapter_alone_is_trained():
    (said,) = dtype_problems("float16", lora=False)
    assert "model.dtype must not be float16" in said
    assert "Set model.dtype=bfloat16, or float32" in said
    assert list(dtype_problems("float16", lora=True)) == []
    (said,) = dtype_remarks("float16", True, Arguments())
    assert "pass through float16" in said
    for dtype in ("float32", "bfloat16", "float64", None):
        assert list(dtype_problems(dtype, lora=False)) == []


def test_the_format_of_auto_is_that_of_the_saved_weights(tmp_path):
    tiny_policy()[0].half().save_pretrained(tmp_path)
    assert known_model(Model(path=str(tmp_path), dtype="auto"))[1] == "float16"
    assert known_model(Model(path=str(tmp_path)))[1] == "float32"
    assert known_model(Model(path=str(tmp_path / "none"), dtype="auto")) == (None, None)
    assert known_model(Model(), tiny_policy()[0].bfloat16())[1] == "bfloat16"


def test_trained_weights_in_float16_are_named():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2).half()})
    with pytest.raises(ModelError, match=r"the critic must not be trained in float16, as b.weight and 1 more"):
        check_trained(module, "the critic")
    module["b"].requires_grad_(False)
    check_trained(module)


def test_gradients_of_an_adapter_on_float16_are_right_for_few_tokens_alone():
    from peft import LoraConfig, get_peft_model

    def gradient(dtype: torch.dtype, tokens: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(
                tiny_policy()[0].to(dtype), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
            )
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(p, 0, 0.01)
        ids = torch.arange(3, 67).view(2, 32)
        logps = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])
        (logps * torch.linspace(-1, 2, 31)[:, None]).sum().div(tokens).backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert {g.dtype for g in grads} == {torch.float32}
        return torch.cat([g.flatten() for g in grads]).double() * tokens

    due = gradient(torch.float32, 1)

    def error(dtype: torch.dtype, tokens: int) -> float:
        return float((gradient(dtype, tokens) - due).norm() / due.norm())

    assert error(torch.float16, 256) < 0.01
    assert error(torch.float16, 2**20) > 0.2
    assert error(torch.bfloat16, 2**20) < 0.02


def test_a_policy_that_sees_the_future_is_named_with_the_fix():
    with pytest.raises(ModelError, match=r"BertLMHeadModel attends to later tokens.* Set is_decoder to true"):
        check_causal(other("bert", is_decoder=False))
    check_causal(other("bert"))


@pytest.mark.parametrize(
    "added",
    [
        {"eos_token": "<end>"},
        {"bos_token": "<start>"},
        {"extra_special_tokens": ["<tool>", "</tool>"]},
        {"eos_token": "<end>", "pad_token": "<end>"},
    ],
    ids=str,
)
def test_a_token_without_a_row_is_refused_with_its_id_and_the_size(added):
    model, tokenizer = tiny_policy()
    rows = len(tokenizer)
    tokenizer.add_special_tokens(added)
    first = next(iter(added.values()))
    name = first if isinstance(first, str) else first[0]
    with pytest.raises(ModelError, match=f"which has {rows}, got '{name}' with id {rows}"):
        check_vocabulary(tokenizer, model)
    model.resize_token_embeddings(len(tokenizer))
    check_vocabulary(tokenizer, model)


def test_a_plain_added_token_needs_a_row_too():
    model, tokenizer = tiny_policy()
    tokenizer.add_tokens(["hello", "world"])
    with pytest.raises(ModelError, match=r"'hello' with id \d+ and 1 more"):
        check_vocabulary(tokenizer, model)


def test_padding_and_tokens_for_images_need_no_row():
    model, tokenizer = tiny_policy()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    check_vocabulary(tokenizer, model)
    again = type(tokenizer)(
        tokenizer_object=tokenizer._tokenizer, eos_token="<eos>", extra_special_tokens={"image_token": "<image>"}
    )
    again.pad_token = "[PAD]"
    assert again.image_token_id > len(model.get_input_embeddings().weight)
    check_vocabulary(again, model)


def test_padding_without_a_row_is_replaced_where_it_enters_a_model():
    model, tokenizer = tiny_policy()
    assert pad_token_id(tokenizer, model) == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    pad = tokenizer.pad_token_id
    assert pad == len(model.get_input_embeddings().weight)
    assert pad_token_id(tokenizer, model) == tokenizer.eos_token_id
    with embedded_padding(tokenizer, model):
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", pad)
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    configure_padding(model, tokenizer)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
