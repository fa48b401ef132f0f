"""Greedy rows are the model's own, samples have its distribution, and the contract of every rollout engine."""

from __future__ import annotations

import pytest
import torch
from hf_rlhf_prompt_lookup import PromptLookup

from hf_rlhf.axes import Policy
from hf_rlhf.batch import Prompt
from hf_rlhf.testing import conformance, tiny_policy

ENGINE = PromptLookup(max_new_tokens=8, draft_tokens=4)


@pytest.fixture(scope="module")
def policy():
    model, tokenizer = tiny_policy()
    return Policy(model=model.eval(), tokenizer=tokenizer, device=torch.device("cpu"))


def prompt(policy, text: str) -> Prompt:
    return Prompt(ids=policy.tokenizer(text, add_special_tokens=False)["input_ids"], prompt=text)


@pytest.mark.parametrize("fact", conformance(ENGINE), ids=str)
def test_conforms(fact):
    fact()


def test_greedy_rows_are_those_of_the_model_alone(policy):
    given = prompt(policy, "12+12+12+12=")
    row = ENGINE(policy, [given], 1, temperature=0).ids[0]
    ids = torch.tensor([given.ids])
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat((ids, policy.model(ids).logits[:, -1:].argmax(-1)), 1)
    assert row == ids[0, len(given.ids) :].tolist()[: len(row)]


def test_the_second_token_whose_draft_was_checked_has_the_distribution_of_the_policy(policy):
    torch.manual_seed(0)
    given, rows = prompt(policy, "3+3+3+3"), 300
    drawn = PromptLookup(max_new_tokens=2, draft_tokens=4, temperature=0.3)(policy, [given], rows).ids
    end, size = policy.tokenizer.eos_token_id, policy.model.config.vocab_size
    seconds = torch.bincount(torch.tensor([row[1] for row in drawn if len(row) == 2]), minlength=size) / rows
    pairs = torch.tensor([[*given.ids, token] for token in range(size)])
    with torch.no_grad():
        logits = policy.model(pairs).logits / 0.3
    first = logits[0, -2].softmax(-1)
    first[end] = 0.0
    expected = first @ logits[:, -1].softmax(-1)
    assert (seconds - expected).abs().max() < 4 * (0.25 / rows) ** 0.5


def test_repetition_saves_forwards_and_the_saving_is_reported(policy):
    ENGINE.report()
    ENGINE(policy, [prompt(policy, "12+12+12+12=")], 4, temperature=0)
    assert ENGINE.report()["tokens_per_forward"] > 1
    assert ENGINE.report() == {}
