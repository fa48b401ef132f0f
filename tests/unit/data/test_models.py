"""Loading models and tokenizers as recipes name them."""

from __future__ import annotations

import pytest

from hf_rlhf.contract.model_settings import Lora, Model
from hf_rlhf.data.model_loading import (
    disable_dropout,
    load_model,
    load_tokenizer,
    lora_config,
    prepare_tokenizer,
    zero_dropout,
)
from hf_rlhf.modeling.attention import draws
from hf_rlhf.testing import tiny_policy


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 258, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=257, eos_token_id=257, **options))


def test_a_saved_model_comes_back_with_its_weights(tiny_model_path, tiny_model):
    import torch

    model = load_model(Model(path=str(tiny_model_path)))
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_dtype_and_attention_are_taken_from_the_settings(tiny_model_path):
    import torch

    model = load_model(Model(path=str(tiny_model_path), dtype="bfloat16", attn_implementation="eager"))
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_without_dropout_training_mode_computes_what_eval_mode_does(tmp_path, tiny_model, kind, attention):
    import torch

    tiny_model.config.attention_dropout = 0.5
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5) if kind == "gpt2" else tiny_model
    model.save_pretrained(tmp_path)
    ids = torch.arange(20).reshape(2, 10)
    for keep in (False, True):
        loaded = load_model(Model(path=str(tmp_path), dropout=keep, attn_implementation=attention))
        equal = torch.equal(loaded.train()(ids).logits, loaded.eval()(ids).logits)
        assert equal is not keep


def test_disabled_dropout_is_what_the_config_says_too():
    model = disable_dropout(gpt2())
    assert [model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop] == [0.0] * 3
    assert model.config.summary_first_dropout == 0.0
    critic = gpt2()
    assert draws(critic)
    zero_dropout(critic)
    assert not draws(critic), "else no equal rows would be shared"


def test_tokenizers_pad_on_the_left_with_the_end_of_sequence_where_they_have_no_padding(tmp_path):
    from tests.helpers.models import byte_tokenizer

    byte_tokenizer(pad_token=None, model_max_length=77).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(Model(path=str(tmp_path)))
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == 258


def test_a_padding_token_of_its_own_stays(tiny_model_path):
    assert load_tokenizer(Model(path=str(tiny_model_path))).pad_token == "<pad>"


def test_a_tokenizer_without_an_end_of_sequence_is_refused():
    from tests.helpers.models import byte_tokenizer

    with pytest.raises(ValueError, match="no end-of-sequence token"):
        prepare_tokenizer(byte_tokenizer(eos_token=None), Model())


def test_the_tokenizer_may_live_elsewhere_and_the_chat_template_be_replaced(tmp_path, tiny_model_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0]['content'] }}!")
    for template in (str(file), "{{ messages[0]['content'] }}!"):
        tokenizer = load_tokenizer(Model(path="unused", tokenizer=str(tiny_model_path), chat_template=template))
        given = prepare_tokenizer(tiny_policy()[1], Model(chat_template=template))
        for each in (tokenizer, given):
            assert each.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_places_without_a_model_are_named(tmp_path, tiny_model_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"set model\.path"):
            load(Model())
        with pytest.raises(ValueError, match=r"no (model )?folder /missing/model: there is no folder /missing"):
            load(Model(path="/missing/model"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(Model(path=str(tmp_path)))
    with pytest.raises(ValueError, match="must be a Jinja template or a file"):
        load_tokenizer(Model(path=str(tiny_model_path), chat_template="missing.jinja"))


def test_lora_settings_reach_peft(tiny_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model, lora_config(Lora(r=3, alpha=9, dropout=0.1, target_modules=["q_proj"])))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 9, 0.1, {"q_proj"})
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name and "q_proj" in name for name in trained)
