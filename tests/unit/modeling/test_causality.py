"""A policy must not see the future: its earlier logits stay when its last token changes."""

from __future__ import annotations

import pytest
import torch

from hf_rlhf.modeling.causality import future_seen
from tests.helpers.decoding import ARCHITECTURES, OTHERS, other, tiny

ENCODERS = (
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "roberta"),
    *("roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"),
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_see_the_future_unless_they_are_decoders(kind, dtype):
    assert future_seen(other(kind, dtype, is_decoder=False)) > 0.01
    assert future_seen(other(kind, dtype)) is None


def test_other_models_that_see_the_future():
    assert future_seen(other("xlm", causal=False)) > 0.01
    assert future_seen(other("xlnet")) > 0.01


@DTYPES
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoders_do_not(name, dtype):
    assert future_seen(tiny(name).to(dtype)) is None


@pytest.mark.parametrize("kind", sorted(set(OTHERS) - {"xlnet"}))
def test_other_decoders_do_not(kind):
    assert future_seen(other(kind)) is None


def test_an_untrained_encoder_of_the_usual_size_of_weights_is_found():
    from transformers import AutoModelForCausalLM, BertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for seed in range(5):
        torch.manual_seed(seed)
        assert future_seen(AutoModelForCausalLM.from_config(BertConfig(vocab_size=300, **sizes))) is not None


def test_a_window_that_looks_ahead_is_found():
    """One layer that lets each token see the next one, and no further."""
    model = tiny("llama")
    assert future_seen(model) is None
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda module, args, out: out + 0.01 * args[0].roll(-1, 1))
    assert future_seen(model) is not None


def test_the_probe_leaves_modes_and_random_numbers_alone():
    model = other("bloom", hidden_dropout=0.5).train()
    state = torch.get_rng_state()
    assert future_seen(model) is None
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
