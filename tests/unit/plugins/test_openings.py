"""Tags that the prompt leaves open: they count for `format`, and thoughts that they open are not graded."""

from __future__ import annotations

import dataclasses

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.scoring.protocol import read_request
from hf_rlhf.testing import rollouts

GOOD = "two and two</think>\n<answer>4</answer>"


def given(*texts, opening="<think>\n", answer="4"):
    made = rollouts(texts, columns={"answer": [answer] * len(texts)})
    return dataclasses.replace(made, openings=[opening] * len(texts))


@pytest.mark.parametrize(
    "settings", [{}, {"tags": ["think", "answer"]}, {"pattern": r"<think>.*</think>\s*<answer>\d+</answer>"}]
)
def test_a_tag_that_the_prompt_opened_counts(settings):
    wanted = load_plugin("rewards", "format", **settings)
    assert wanted(given(GOOD)) == [1.0]
    assert wanted(given(GOOD, opening="")) == [0.0]
    assert wanted(given(f"<think>{GOOD}", opening="")) == [1.0]
    assert wanted(given("two and two\n<answer>4</answer>")) == [0.0]
    assert wanted(rollouts([GOOD])) == [0.0]


def test_patterns_made_for_completions_alone_still_match():
    wanted = load_plugin("rewards", "format", pattern=r"[^<]*</think>\s*<answer>.*</answer>")
    assert wanted(given(GOOD)) == [1.0]


def test_leading_white_space_is_no_fault_of_form():
    assert load_plugin("rewards", "format")(given(f" <think>{GOOD}", opening="")) == [1.0]


@pytest.mark.parametrize("name", ["numeric", "choice"])
def test_an_opened_thought_is_not_graded(name):
    wanted, answer = load_plugin("rewards", name), {"numeric": "4", "choice": "B"}[name]
    texts = (f"{answer}?</think> The answer is {answer}.", f"The answer is {answer}")
    assert wanted(given(*texts, answer=answer)) == [1.0, 0.0], "the second never ends its thought"
    assert wanted(given(*texts, opening="", answer=answer)) == [1.0, 1.0]


def test_openings_go_with_their_rows_and_through_requests():
    made = given("a", "b", opening="<think>")
    assert made.select([1]).turns() == ["<think>b"]
    assert rollouts(["a"]).turns() == ["a"]
    body = b'{"version": 1, "prompts": ["p"], "completions": ["c"], "openings": ["<think>"]}'
    assert read_request(body, set()).turns() == ["<think>c"]
    sent = load_plugin("rewards", "remote", url="http://127.0.0.1:1/score")._request
    assert sent(made, range(1, 2))["openings"] == ["<think>"]
    assert "openings" not in sent(rollouts(["a"]), range(1))
