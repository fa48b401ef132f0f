"""`model.generate` samples from the policy: it is tried on padded rows, then on rows of equal length, or the model is refused."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hf_rlhf import load_plugin
from hf_rlhf.axes import Context
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf_plugins.rollout import _checks
from hf_rlhf_plugins.rollout._architectures import EQUAL_LENGTHS, REFUSED, WITHOUT_CACHE
from hf_rlhf_plugins.rollout._trials import try_generate
from tests.helpers.decoding import other, plain_logps, policy_of, prompts_of, tiny

LENGTHS = (7, 15, 1, 7)
PADDED = (
    *("bamba", "bloom", "falcon_h1", "falcon_mamba", "gpt_neo", "gptj", "granitemoehybrid", "jamba", "lfm2", "mamba"),
    *("mamba2", "nemotron_h", "qwen3_next", "zamba", "zamba2", "bert", "electra", "megatron-bert", "roformer"),
)
"""Types from which `model.generate` samples whatever the padding."""


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch):
    monkeypatch.setattr(_checks, "_SAID", set())


def engine(**settings: Any) -> Any:
    return load_plugin("rollout", "generate", **{"max_new_tokens": 24, "temperature": 2.0, **settings})


def drawn(policy: Policy, lengths: Any = LENGTHS, **settings: Any) -> Any:
    with seeded("drawn", 0):
        return engine(**settings)(policy, prompts_of(*lengths), 2)


def gaps(policy: Policy, found: Any, prompts: Any, temperature: float) -> list[float]:
    """Difference of each row's log-probs from those of a plain forward of the row alone."""
    return [
        float((torch.tensor(logps) - plain_logps(policy.model, prompts[row // 2].ids, ids, temperature)).abs().max())
        for row, (ids, logps) in enumerate(zip(found.ids, found.logps, strict=True))
    ]


@pytest.mark.parametrize("kind", PADDED)
def test_models_that_take_padding_decode_all_prompts_at_a_time(kind):
    for dtype in (torch.float32, torch.bfloat16):
        assert not try_generate(policy_of(other(kind, dtype)), {}).equal_lengths
    policy = policy_of(other(kind))
    found = drawn(policy, max_new_tokens=8)
    rough = {"nemotron_h": 0.03, "zamba2": 0.03}
    assert max(gaps(policy, found, prompts_of(*LENGTHS), 2.0)) < rough.get(kind, 1e-4)


@pytest.mark.parametrize("kind", ["recurrent_gemma", "minimax", "bart", "rwkv", "xlstm"])
def test_models_that_take_in_padding_decode_one_length_at_a_time(kind, caplog):
    settings = {"generation_kwargs": {"use_cache": False}} if kind in WITHOUT_CACHE else {}
    policy = policy_of(other(kind))
    with caplog.at_level(logging.WARNING, logger=_checks.__name__):
        found = drawn(policy, **settings)
    assert max(gaps(policy, found, prompts_of(*LENGTHS), 2.0)) < 1e-4
    (said,) = [r.getMessage() for r in caplog.records if "is padded on the left" in r.getMessage()]
    assert "one length after the other" in said
    assert "up to 32 times as long as one batch" in said
    assert [policy.model.training, len(found.ids)] == [False, 8]


def test_rows_of_a_length_depend_neither_on_other_lengths_nor_on_the_order_of_the_calls():
    policy, prompts = policy_of(other("recurrent_gemma")), prompts_of(7, 15, 1, 7)

    def sample(which: list[int], **settings: Any) -> Any:
        with seeded("drawn", 0):
            return engine(**settings)(policy, [prompts[i] for i in which], 2)

    whole = sample([0, 1, 2, 3])
    assert whole.ids == sample([0, 1, 2, 3]).ids
    assert sample([0, 3]).ids == whole.ids[:2] + whole.ids[6:]
    assert sample([2]).ids == whole.ids[4:6]
    swapped = sample([1, 0, 3])
    assert swapped.ids == whole.ids[2:4] + whole.ids[:2] + whole.ids[6:]
    assert sample([2]).ids == whole.ids[4:6], "a prompt of one token does not go on from earlier rows"
    parts = sample([0, 1, 2, 3], max_rows=2)
    assert max(gaps(policy, parts, prompts, 2.0)) < 1e-4


def test_greedy_rows_are_those_of_each_prompt_alone():
    policy, prompts = policy_of(other("recurrent_gemma")), prompts_of(*LENGTHS)
    found = engine()(policy, prompts, 2, temperature=0.0)
    config = GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0, eos_token_id=1)
    for i, prompt in enumerate(prompts):
        due = policy.model.generate(input_ids=torch.tensor([prompt.ids]), generation_config=config)
        assert found.ids[2 * i] == found.ids[2 * i + 1] == due[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        ("rwkv", "set rollout.generation_kwargs={use_cache: false}"),
        ("xlstm", "set rollout.generation_kwargs={use_cache: false}"),
        ("roberta", "Choose another model"),
        ("xlm", "Choose another model"),
        ("xlnet", "Choose another model"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_whose_generation_is_another_one_is_refused(kind, fix, dtype):
    if kind in ("xlnet", "xlstm") and dtype == torch.bfloat16:
        fix = "another model"  # their forward has no bfloat16
    policy = policy_of(other(kind, dtype))
    with pytest.raises(ValueError, match=f"does not sample from {type(policy.model).__name__}") as refused:
        engine().setup(Context(device=policy.device, tokenizer=policy.tokenizer, policy=policy.model))
    assert fix in str(refused.value)
    with pytest.raises(ValueError, match="does not sample from"):
        drawn(policy)


@pytest.mark.parametrize("kind", sorted(EQUAL_LENGTHS | WITHOUT_CACHE | REFUSED))
def test_what_plans_say_of_an_architecture_is_what_the_trial_finds(kind):
    policy, uncached = policy_of(other(kind)), {"use_cache": False}
    (said,) = engine().model_remarks(policy.model.config)
    if kind in EQUAL_LENGTHS:
        assert "one length after the other" in said
        assert try_generate(policy, {}).equal_lengths
        return
    assert "refused" in said
    with pytest.raises(ValueError, match="does not sample from"):
        try_generate(policy, {})
    if kind in WITHOUT_CACHE:
        (said,) = engine(generation_kwargs=uncached).model_remarks(policy.model.config)
        assert "one length after the other" in said
        assert try_generate(policy, uncached).equal_lengths


def test_plans_say_nothing_of_other_architectures():
    for kind in PADDED:
        assert list(engine().model_remarks(SimpleNamespace(model_type=kind))) == []


def test_a_plan_says_once_that_lengths_are_decoded_one_after_the_other():
    policy = policy_of(other("recurrent_gemma"))
    made = engine(prompts=5)
    made.setup(Context(device=policy.device, tokenizer=policy.tokenizer, policy=policy.model))
    (known,) = made.model_remarks(policy.model.config)
    assert [remark for remark in made.remarks(None) if "one length" in remark] == [known]
    assert "the 5 prompts of a rollout take up to 5 times as long" in known


def test_settings_that_need_generate_are_tried_with_it():
    policy = policy_of(tiny("llama"))
    found = drawn(policy, generation_kwargs={"min_new_tokens": 3, "cache_implementation": "static"}, max_new_tokens=8)
    assert max(gaps(policy, found, prompts_of(*LENGTHS), 2.0)) < 1e-4
    for settings in ({}, {"min_new_tokens": 3}, {"suppress_tokens": [5, 11, 18]}, {"forced_eos_token_id": 1}):
        assert not try_generate(policy, settings).equal_lengths, settings


def test_trials_draw_no_random_numbers_and_leave_the_model_as_it_was():
    model = other("recurrent_gemma").train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    own = model.generation_config
    try_generate(policy_of(model), {})
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own
    assert all(p.grad is None for p in model.parameters())


def test_dropout_does_not_count_as_a_difference():
    model = other("bloom", hidden_dropout=0.5, attention_dropout=0.5).train()
    assert not try_generate(policy_of(model), {}).equal_lengths
