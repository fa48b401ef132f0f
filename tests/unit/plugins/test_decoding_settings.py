"""What makes `generate` decode with transformers' own `model.generate`, and what its other settings do."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from hf_rlhf import load_plugin
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.testing import tiny_policy
from hf_rlhf_plugins.rollout import _checks
from hf_rlhf_plugins.rollout._decoding import copy_of
from tests.helpers import runs
from tests.helpers.decoding import plain_logps, policy_of, prompts_of, tiny

CPU = torch.device("cpu")


class OnlyEven(LogitsProcessor):
    """Lets no odd token through."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[:, 1::2] = -torch.inf
        return scores


class Wants(LogitsProcessor):
    def __init__(self, number: int):
        self.number = number


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch):
    monkeypatch.setattr(_checks, "_SAID", set())


def engine(**settings: Any) -> Any:
    return load_plugin("rollout", "generate", **{"max_new_tokens": 12, **settings})


def generates(policy: Policy, made: Any, **call: Any) -> Any:
    """What the engine gives, and whether it called `model.generate`."""
    own, calls = type(policy.model).generate, []

    def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(model, *args, **kwargs)

    policy.model.generate = counted.__get__(policy.model)
    try:
        with seeded("drawn", 0):
            return made(policy, prompts_of(5, 8), 4, **call), bool(calls)
    finally:
        del policy.model.generate


def problems(**settings: Any) -> list[str]:
    """Why a recipe with these settings is refused."""
    recipe = runs.recipe(rollout={"use": "generate", "prompts": 4, "num_generations": 4, **settings})
    return recipe.algorithm().problems()


PROCESSOR = f"{__name__}:OnlyEven"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("stop_strings", ["zz"]), ("logits_processors", [PROCESSOR]), ("generation_kwargs", {"min_new_tokens": 3})],
)
def test_a_setting_that_only_generate_knows_is_said_once(setting, value, caplog):
    policy = Policy(model=tiny_policy()[0], tokenizer=tiny_policy()[1], device=CPU)
    with caplog.at_level(logging.INFO, logger=_checks.__name__):
        for _ in range(2):
            assert generates(policy, engine(**{setting: value}))[1]
    assert [(r.levelname, r.getMessage()) for r in caplog.records if r.name == _checks.__name__] == [
        ("INFO", f"rollout=generate decodes with model.generate: {setting} is set")
    ]
    assert not generates(policy, engine())[1]


def unlike(kind: str) -> Any:
    """A model that the decode loop does not serve."""
    from transformers import GPTJConfig, GPTJForCausalLM, MambaConfig, MambaForCausalLM

    if kind == "recurrent":
        config = MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0)
        return MambaForCausalLM(config).eval()
    if kind == "own attention":
        return GPTJForCausalLM(GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)).eval()
    model = tiny("llama")
    if kind == "positions":

        def restarts(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            packed = len(out[0]) == 1 and bool((kwargs["position_ids"].diff() < 0).any())
            return tuple(x * (1 + packed) for x in out)

        model.model.rotary_emb.register_forward_hook(restarts, with_kwargs=True)
    if kind == "rope":
        model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        model.config.max_position_embeddings = 15
    return model


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("recurrent", "linear_attention are neither full nor sliding-window attention"),
        ("own attention", "does not go through transformers' attention registry"),
        ("positions", "its logits differ from those of a plain forward"),
        ("rope", "its rotary embedding depends on the longest row of a batch beyond 15 tokens"),
    ],
)
def test_a_model_that_the_loop_does_not_serve_is_decoded_by_generate(kind, reason, caplog):
    torch.manual_seed(0)
    policy = policy_of(unlike(kind))
    with caplog.at_level(logging.INFO, logger=_checks.__name__):
        found, slow = generates(policy, engine())
        generates(policy, engine())
    assert slow
    assert len(found.ids) == len(found.logps) == 8
    (record,) = [record for record in caplog.records if record.name == _checks.__name__]
    assert record.levelname == "WARNING"
    assert reason in record.getMessage()


def test_models_are_tried_without_random_numbers_and_left_as_they_were():
    for name in ("llama", "qwen3_moe"):
        first, again = (policy_of(tiny(name)) for _ in range(2))
        _checks.unserved(again.model, CPU, 9)
        implementation = again.model.config._attn_implementation
        assert generates(first, engine())[0].ids == generates(again, engine())[0].ids
        assert again.model.config._attn_implementation == implementation == "sdpa"


def test_both_ways_give_the_same_greedy_tokens_and_the_log_probs_of_the_policy():
    policy = policy_of(tiny("qwen2"))
    other = engine(generation_kwargs={"renormalize_logits": True})
    quick, slow = (generates(policy, made, temperature=0.0) for made in (engine(), other))
    assert (quick[1], slow[1]) == (False, True)
    assert quick[0].ids == slow[0].ids
    found = generates(policy, engine(logits_processors=[PROCESSOR], top_k=9, repetition_penalty=2.0))[0]
    for row, (ids, logps) in enumerate(zip(found.ids, found.logps, strict=True)):
        due = plain_logps(policy.model, prompts_of(5, 8)[row // 4].ids, ids, 1.0)
        torch.testing.assert_close(torch.tensor(logps), due, rtol=0, atol=1e-5)


def test_a_stop_string_ends_a_row_and_stays_in_it():
    model, tokenizer = tiny_policy()
    policy = Policy(model=model, tokenizer=tokenizer, device=CPU, wants_logps=True)
    made = engine(stop_strings=["w", "7", "8U"], max_new_tokens=40)
    found, _ = generates(policy, made)
    texts = tokenizer.batch_decode(found.ids, skip_special_tokens=True)
    assert any(text.endswith(("w", "7")) for text in texts)
    for text, ids, logps, reason in zip(texts, found.ids, found.logps, found.finish_reasons, strict=True):
        assert len(logps) == len(ids)
        assert not any(stop in text[:-1] for stop in ("w", "7"))
        ended = text.endswith(("w", "7", "8U")) or ids[-1] == tokenizer.eos_token_id
        assert reason == ("stop" if ended else "length")
        assert ended or len(ids) == 40


def test_a_logits_processor_changes_what_is_drawn():
    found, _ = generates(policy_of(tiny("qwen2")), engine(logits_processors=[PROCESSOR], temperature=3.0))
    assert all(token % 2 == 0 for ids in found.ids for token in ids)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "must have the form package.module:Class"),
        ("nowhere.at_all:Class", "cannot be imported: No module named 'nowhere'"),
        (f"{__name__}:Missing", "cannot be imported: module .* has no attribute 'Missing'"),
        (f"{__name__}:Policy", "must be a subclass of transformers.LogitsProcessor"),
        (f"{__name__}:Wants", "must be callable without arguments"),
    ],
)
def test_a_wrong_path_of_a_processor_is_an_error(path, message):
    with pytest.raises(ValueError, match=message):
        _checks.load_processors([path])
    with pytest.raises(ValueError, match=message):
        engine(logits_processors=[path]).setup(None)
    assert any(re.search(message, said) for said in problems(logits_processors=[path]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 2.0}, "Set rollout.temperature"),
        ({"num_return_sequences": 2}, "Set rollout.num_generations"),
        ({"stop_strings": ["x"]}, "Set rollout.stop_strings"),
        ({"num_beams": 4}, "must be sampled token by token from the policy"),
        ({"min_new_token": 4}, "has no 'min_new_token'. Did you mean 'min_new_tokens'"),
        ({"cache_implementation": "mine"}, "rollout.generation_kwargs: .*cache_implementation"),
    ],
)
def test_a_keyword_that_is_wrong_is_an_error_before_a_model_is_loaded(kwargs, message):
    assert any(re.search(message, said) for said in problems(generation_kwargs=kwargs))


def test_keywords_of_generate_and_an_empty_stop_string():
    assert list(_checks.generation_problems({"min_new_tokens": 2, "typical_p": 0.9})) == []
    assert "must not contain an empty text" in next(iter(engine(stop_strings=[""]).check(None)))
    found, _ = generates(policy_of(tiny("qwen2")), engine(generation_kwargs={"suppress_tokens": list(range(2, 99))}))
    assert {token for ids in found.ids for token in ids} <= {0, 1}


def test_bfloat16_decodes_with_a_rounded_copy_and_leaves_the_model_alone():
    policy = policy_of(tiny("qwen3"))
    before = {name: x.clone() for name, x in policy.model.state_dict().items()}
    same, narrow = (generates(policy, engine(decode_dtype=kind, temperature=3.0)) for kind in ("same", "bfloat16"))
    assert not narrow[1]
    assert narrow[0].logps != same[0].logps
    for row, (ids, logps) in enumerate(zip(narrow[0].ids, narrow[0].logps, strict=True)):
        due = plain_logps(policy.model, prompts_of(5, 8)[row // 4].ids, ids, 3.0)
        assert (torch.tensor(logps) - due).abs().mean() < 0.1
    assert all(torch.equal(x, before[name]) for name, x in policy.model.state_dict().items())
    assert next(policy.model.parameters()).dtype == torch.float32
    assert engine().exact_logps
    assert not engine(decode_dtype="bfloat16").exact_logps
    assert any("rollout_correction" in said for said in engine(decode_dtype="bfloat16").remarks(None))


def test_logits_that_are_no_numbers_are_an_error():
    policy = policy_of(tiny("qwen2"))
    assert _checks.unserved(policy.model, CPU, 9) is None
    with torch.no_grad():
        policy.model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        generates(policy, engine())


def test_gradient_checkpointing_in_training_mode_changes_nothing():
    model = tiny("qwen2")
    due = generates(policy_of(model), engine())[0]
    model.gradient_checkpointing_enable()
    model.train()
    found, slow = generates(policy_of(model), engine())
    assert not slow
    assert (found.ids, found.logps) == (due.ids, due.logps)
    assert model.is_gradient_checkpointing
    assert model.training


def test_a_copy_keeps_ties_and_buffers():
    model = tiny("gemma2")
    assert model.config.tie_word_embeddings
    narrow = copy_of(model, torch.bfloat16)
    assert narrow.lm_head.weight is narrow.model.embed_tokens.weight
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert all(a is b for a, b in zip(narrow.buffers(), model.buffers(), strict=True))
    assert not any(p.requires_grad for p in narrow.parameters())
    assert narrow.model.layers[0] is not model.model.layers[0]


def test_autocast_and_adapters_are_served():
    from peft import get_peft_model

    from hf_rlhf.contract.model_settings import Lora
    from hf_rlhf.data.model_loading import lora_config

    model = get_peft_model(tiny("llama"), lora_config(Lora(r=4)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0), std=0.3)
    policy = policy_of(model.eval())
    found, slow = generates(policy, engine(temperature=3.0))
    assert not slow
    for row, (ids, logps) in enumerate(zip(found.ids, found.logps, strict=True)):
        due = plain_logps(model, prompts_of(5, 8)[row // 4].ids, ids, 3.0)
        torch.testing.assert_close(torch.tensor(logps), due, rtol=0, atol=5e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found, slow = generates(policy_of(tiny("llama")), engine(temperature=3.0))
        assert not slow
        due = plain_logps(tiny("llama"), prompts_of(5, 8)[0].ids, found.ids[0], 3.0)
    assert (torch.tensor(found.logps[0]) - due).abs().mean() < 0.1
