"""Rewards by token and by step from models with a tokenizer of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from hf_rlhf import load_plugin
from hf_rlhf.batch import Spans
from hf_rlhf.config.recipe_yaml import RecipeError
from hf_rlhf.testing import conformance, rollouts
from tests.helpers import runs
from tests.helpers.classifiers import TEMPLATE, TOKENIZERS, direct, logits_of, merging_tokenizer, save_token_classifier

PROMPT = "say: "
TEXTS = ["12ab1", "", "a", "ab12ab12ab", "é12"]


def loaded(name: str, folder: str | Path, **settings: Any) -> Any:
    source = load_plugin("rewards", name, model=str(folder), **settings)
    source.load_model(torch.device("cpu"))
    return source


def given(completions: list[str], prompts: list[Any] | None = None) -> Any:
    rows = rollouts([text.encode("ascii", "replace").decode() for text in completions], prompts=prompts)
    rows.completions = list(completions)
    if prompts is None:
        rows.prompts = [PROMPT] * len(completions)
    return rows


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def assert_close(found: Spans | None, expected: list[tuple[int, float]]) -> None:
    assert found is not None
    assert [end for end, _ in found.values] == [end for end, _ in expected]
    assert [value for _, value in found.values] == pytest.approx([value for _, value in expected], abs=1e-5)


# token_reward_model


ENDS = {"12ab1": [2, 4, 5], "": [], "a": [1], "ab12ab12ab": [2, 4, 6, 8, 10], "é12": [1, 1, 3]}
"""Where each of the model's tokens ends: merged pairs are one token, the two bytes of é are two."""


@pytest.mark.parametrize("pad", [None, 0], ids=["no pad token", "a pad token"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.proves("rewards.token_reward_model", how="closed form", tolerance="1e-5")
def test_each_token_of_the_model_is_a_reward_where_it_ends_in_any_batch(tmp_path, pad, batch_size):
    folder = save_token_classifier(tmp_path, pad=pad)
    found = loaded("token_reward_model", folder, batch_size=batch_size)(given(TEXTS))
    for text, spans in zip(TEXTS, found, strict=True):
        logits = [row[0] for row in logits_of(folder, merging_tokenizer()(PROMPT + text)["input_ids"])]
        own = logits[len(logits) - len(ENDS[text]) :] if text else []
        assert_close(spans, list(zip(ENDS[text], own, strict=True)))


def test_a_token_across_the_border_to_the_prompt_counts_and_the_prompt_does_not(tmp_path):
    folder = save_token_classifier(tmp_path)
    ids = merging_tokenizer()("b12")["input_ids"]
    assert len(ids) == 3, "<bos>, b, and 12, whose first character is the prompt's"
    (spans,) = loaded("token_reward_model", folder)(given(["2"], prompts=["b1"]))
    assert_close(spans, [(1, logits_of(folder, ids)[2][0])])


def test_the_model_speaks_its_own_chat_template(tmp_path):
    tokenizer = merging_tokenizer(TEMPLATE)
    folder = save_token_classifier(tmp_path, tokenizer=tokenizer)
    prompts = [[{"role": "user", "content": "ab?"}]] * 2
    found = loaded("token_reward_model", folder)(given(["12", "ab?"], prompts))
    for text, ends, spans in zip(["12", "ab?"], [[2], [2, 3]], found, strict=True):
        ids = tokenizer(f"[u]ab?|[a]{text}|", add_special_tokens=False)["input_ids"]
        own = logits_of(folder, ids)[-1 - len(ends) : -1]
        assert_close(spans, [(end, row[0]) for end, row in zip(ends, own, strict=True)])


def test_a_template_may_strip_white_space_and_a_row_that_it_rewrites_has_no_score(tmp_path, caplog):
    stripping = TEMPLATE.replace("m['content']", "m['content'] | trim")
    rewriting = TEMPLATE.replace("m['content']", "m['content'].split('x')[-1]")
    for name, template in (("stripping", stripping), ("rewriting", rewriting)):
        save_token_classifier(tmp_path / name, tokenizer=merging_tokenizer(template))
    prompts = [[{"role": "user", "content": "a"}]]
    (plain,) = loaded("token_reward_model", tmp_path / "stripping")(given(["12"], prompts))
    (spaced,) = loaded("token_reward_model", tmp_path / "stripping")(given(["  12 "], prompts))
    assert_close(spaced, [(2 + end, value) for end, value in plain.values])
    assert loaded("token_reward_model", tmp_path / "rewriting")(given(["1x2"], prompts)) == [None]
    assert (
        "has no score for the completion '1x2': the chat template drops part of message 2 (assistant): '1x2'"
        in caplog.text
    )


def test_of_long_texts_only_the_seen_tokens_have_scores(tmp_path):
    """What is kept is <bos> and the end."""
    folder = save_token_classifier(tmp_path)
    source = loaded("token_reward_model", folder, max_length=3)
    spans, short = source(given(["12ab1", ""], prompts=["say: ", "a"]))
    ids = merging_tokenizer()("ab1")["input_ids"]
    assert_close(spans, [(end, row[0]) for end, row in zip([4, 5], logits_of(folder, ids)[1:], strict=True)])
    assert short.values == []
    assert source.take_logs() == ({}, {"truncated": [1.0, 0.0]})


@pytest.mark.proves("rewards.token_reward_model", how="parity", tolerance="rtol 1e-5")
@pytest.mark.parametrize(
    ("arch", "tokens"),
    [
        ("qwen2", "merging"),  # its tokenizer class is byte-level whatever was saved
        *((arch, tokens) for arch in ("llama", "bert", "deberta", "modernbert") for tokens in TOKENIZERS),
        ("gpt2", "merging"),
        ("gpt2", "spaced"),
    ],
)
def test_each_score_stands_at_the_characters_of_its_token(tmp_path, arch, tokens):
    """Against the model and the offsets of its tokenizer, row by row; what an encoder reads is the whole row."""
    folder = save_token_classifier(tmp_path, arch=arch, tokenizer=TOKENIZERS[tokens](), pad=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["12ab1 ab", "A b!", "", "x 12"]
    found = loaded("token_reward_model", folder, batch_size=3)(given(texts))
    for text, spans in zip(texts, found, strict=True):
        row = tokenizer(PROMPT + text, return_offsets_mapping=True)
        logits, border = logits_of(folder, row["input_ids"]), len(PROMPT)
        expected = [
            (end - border, x) for (_, end), (x,) in zip(row["offset_mapping"], logits, strict=True) if end > border
        ]
        assert_close(spans, expected)
        assert not text or spans.values[-1][0] == len(text)


def test_one_of_several_labels_scores(tmp_path):
    folder = save_token_classifier(tmp_path, num_labels=3)
    rows = logits_of(folder, merging_tokenizer()(PROMPT + "ab")["input_ids"])
    (spans,) = loaded("token_reward_model", folder, output=2)(given(["ab"]))
    assert_close(spans, [(2, rows[-1][2])])
    (spans,) = loaded("token_reward_model", folder, output="LABEL_1", value="probability")(given(["ab"]))
    assert_close(spans, [(2, torch.tensor(rows[-1]).softmax(0)[1].item())])


def test_a_row_with_a_number_that_is_not_finite_has_no_score_and_changes_no_other(tmp_path, caplog):
    folder = save_token_classifier(tmp_path)
    before = loaded("token_reward_model", folder)(given(["12", "ab"]))
    model = direct("TokenClassification", folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[merging_tokenizer()("ab")["input_ids"][-1]] = math.inf
    model.save_pretrained(folder)
    first, second = loaded("token_reward_model", folder)(given(["12", "ab"]))
    assert first == before[0]
    assert second is None
    assert "a non-finite number; the row has no score" in caplog.text


def test_what_is_no_token_reward_model_is_named(tmp_path):
    two = save_token_classifier(tmp_path / "two", num_labels=2)
    with pytest.raises(
        ValueError, match=r"token_reward_model: .*two' has 2 labels\. Choose the one that scores: output: 0 "
    ):
        loaded("token_reward_model", two)
    three = save_token_classifier(tmp_path / "three", num_labels=3)
    with pytest.raises(ValueError, match=r"process_reward_model: .*three' has 3 labels\. Choose the one that scores"):
        loaded("process_reward_model", three)
    slow = save_token_classifier(tmp_path / "slow", tokenizer=ByT5Tokenizer())
    with pytest.raises(ValueError, match="Save a fast tokenizer"):
        loaded("token_reward_model", slow)
    sequence = runs.save_classifier(tmp_path / "sequence")
    with pytest.raises(ValueError, match=r"no trained weights for score\.bias: it was not saved as a token classifier"):
        loaded("token_reward_model", sequence)
    one = save_token_classifier(tmp_path / "one")
    closed = loaded("token_reward_model", one)
    closed.close()
    with pytest.raises(RuntimeError, match="not loaded"):
        closed(given(["a"]))
    plain = loaded("token_reward_model", one)
    with pytest.raises(ValueError, match="no chat template"):
        plain(given(["a"], [[{"role": "user", "content": "b"}]]))


# process_reward_model


STEPS = {
    "1a\n\n2b\n\n3c": [4, 8, 10],
    "1a\n\n2b\n\n": [4, 8],
    "1a\n\n \n\n3c": [4, 9],
    "1a\n2b": [5],
    "1a\n\n  ": [4],
    "\n\n": [],
    "": [],
}


@pytest.mark.proves("rewards.process_reward_model", how="closed form", tolerance="1e-5")
@pytest.mark.parametrize("labels", [1, 2])
def test_each_step_has_the_probability_that_the_model_gives_at_its_end(tmp_path, labels):
    folder = save_token_classifier(tmp_path, num_labels=labels)
    found = loaded("process_reward_model", folder)(given(list(STEPS)))
    tokenizer = merging_tokenizer()
    for (text, ends), spans in zip(STEPS.items(), found, strict=True):
        closed = text if text.rstrip(" ").endswith("\n\n") else text + "\n\n"
        stops = [max(end, closed.index("\n\n", end - 2) + 2 if end == len(text) else end) for end in ends]
        expected = []
        for end, stop in zip(ends, stops, strict=True):
            logits = logits_of(folder, tokenizer(PROMPT + closed[:stop])["input_ids"])[-1]
            chance = sigmoid(logits[0]) if labels == 1 else math.exp(logits[1]) / sum(map(math.exp, logits))
            expected.append((end, chance))
        assert_close(spans, expected)


def test_log_odds_are_the_probabilities_before_the_sigmoid(tmp_path):
    folder = save_token_classifier(tmp_path)
    (raw,) = loaded("process_reward_model", folder, value="log_odds")(given(["1a\n\n2b"]))
    (chances,) = loaded("process_reward_model", folder)(given(["1a\n\n2b"]))
    assert_close(chances, [(end, sigmoid(value)) for end, value in raw.values])


def test_a_later_step_changes_no_earlier_reward_of_a_causal_model(tmp_path):
    source = loaded("process_reward_model", save_token_classifier(tmp_path))
    short, long = source(given(["1a\n\n2b\n\n", "1a\n\n2b\n\n3c\n\nab"]))
    assert len(long.values) == 4
    assert_close(Spans(long.values[:2]), short.values)


def test_steps_end_where_the_delimiter_says(tmp_path):
    source = loaded("process_reward_model", save_token_classifier(tmp_path), delimiter=".")
    (spans,) = source(given(["a. b.c"]))
    assert [end for end, _ in spans.values] == [2, 5, 6]
    with pytest.raises(RecipeError, match=r"delimiter: got ''"):
        runs.recipe(rewards=[{"use": "process_reward_model", "model": "x", "delimiter": ""}])


def test_steps_that_the_model_did_not_see_have_no_reward(tmp_path):
    source = loaded("process_reward_model", save_token_classifier(tmp_path), max_length=3)
    (spans,) = source(given(["1a\n\n2b\n\n"]))
    assert [end for end, _ in spans.values] == [8]


def test_in_a_chat_the_step_that_the_template_strips_is_read_at_its_last_token(tmp_path):
    tokenizer = merging_tokenizer(TEMPLATE.replace("m['content']", "m['content'] | trim"))
    folder = save_token_classifier(tmp_path, tokenizer=tokenizer)
    (spans,) = loaded("process_reward_model", folder)(given(["1a\n\n2b"], [[{"role": "user", "content": "a"}]]))
    ids = tokenizer("[u]a|[a]1a\n\n2b|", add_special_tokens=False)["input_ids"]
    logits = logits_of(folder, ids)
    assert_close(spans, [(4, sigmoid(logits[-4][0])), (6, sigmoid(logits[-2][0]))])


# Both


@pytest.mark.parametrize("name", ["token_reward_model", "process_reward_model"])
def test_they_conform(name, tmp_path):
    source = loaded(name, save_token_classifier(tmp_path))
    facts = conformance(source)
    assert len(facts) >= 6
    for fact in facts:
        fact()


@pytest.mark.parametrize("name", ["token_reward_model", "process_reward_model"])
def test_rewards_reach_the_policys_tokens_and_their_sum_is_the_score(name, tmp_path):
    """The policy's tokens are characters: a reward at `end` belongs to token end - 1."""
    folder = save_token_classifier(tmp_path / "model")
    data = [{"prompt": "ab", "completions": ["12ab", "1", "ab\n\n12", "12"]}] * 4
    reward = {"use": name, "model": folder, "weight": 2.0}
    made = runs.trainer(tmp_path, data=data, rewards=[reward], advantages={"use": "reward_to_go", "gamma": 1.0})
    try:
        buffer = made.collector.collect(0)
        source = made.algorithm.rewards[0]
        rewards = buffer.rows["advantages"].clone()
        rewards[:, :-1] -= buffer.rows["advantages"][:, 1:]
        for row, ids in enumerate(buffer.completion_ids):
            text = made.collector.policy.tokenizer.decode(ids, skip_special_tokens=True)
            (spans,) = source(given([text], prompts=["ab"]))
            expected = torch.zeros(rewards.size(1))
            for end, value in spans.values:
                expected[end - 1] += 2 * value
            torch.testing.assert_close(rewards[row], expected, atol=1e-5, rtol=0)
    finally:
        made.close()
