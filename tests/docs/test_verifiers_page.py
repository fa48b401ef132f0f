"""docs/verifiers.md says what the figures say."""

from __future__ import annotations

import json

import pytest

from benchmarks import verifiers as benchmark
from tests.helpers.paths import DATA


@pytest.fixture(scope="module")
def found():
    return json.loads((benchmark.RESULTS / "verifiers.json").read_text())


def test_the_page_is_made_of_the_figures(found):
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(found)


def test_the_figures_are_of_all_graded_solutions(found):
    for entry in found["agreement"]:
        assert entry["rows"] == 2638
        assert not entry["disagreements"], entry["verifier"]


def test_references_in_latex_and_answers_in_tags_are_all_graded_right(found):
    assert found["math"]["right"] == [400, 400]
    assert [entry["right"] for entry in found["r1"]] == [entry["wrong"] for entry in found["r1"]] == [[600, 600]] * 2
    assert found["math"]["wrong"][0] == found["math"]["wrong"][1] > 200


def test_answers_of_math_are_counted_with_their_fragments():
    counts = benchmark.math_answers(DATA / "math")
    assert counts["right"] == [100, 100]
    assert counts["wrong"][0] == counts["wrong"][1] > 50


def test_a_cheap_verifier_takes_less_than_50_microseconds_of_the_core(found):
    slow = ("math_answer", "language")
    assert all(entry["core"] < 50 for entry in found["costs"] if entry["verifier"] not in slow)


def test_who_is_right_is_told_by_the_answers(gsm8k):
    batch, correct, names = benchmark.graded(gsm8k)
    few = batch.select([0, 1])
    entries = benchmark.agreement(few, [1.0 - grade for grade in correct[:2]], names[:2])
    for entry in entries:
        assert [one["right"] for one in entry["disagreements"]] == [entry["verifier"]] * 2
