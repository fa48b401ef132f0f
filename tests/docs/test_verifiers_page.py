"""docs/verifiers.md says what the figures say."""

from __future__ import annotations

import json

import pytest

from benchmarks import verifiers as benchmark


@pytest.fixture(scope="module")
def found():
    return json.loads((benchmark.RESULTS / "verifiers.json").read_text())


def test_the_page_is_made_of_the_figures(found):
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(found)


def test_the_figures_are_of_all_graded_solutions(found):
    for entry in found["agreement"]:
        share = 1 - len(entry["disagreements"]) / entry["rows"]
        assert entry["rows"] == 2638
        assert share >= (0.998 if not entry["settings"] else 0.999), entry["verifier"]
        if entry["verifier"] == "numeric":
            assert not entry["disagreements"]


def test_a_cheap_verifier_takes_less_than_50_microseconds_of_the_core(found):
    slow = ("math_answer", "language")
    assert all(entry["core"] < 50 for entry in found["costs"] if entry["verifier"] not in slow)


def test_who_is_right_is_told_by_the_answers(gsm8k):
    batch, correct, names = benchmark.graded(gsm8k)
    few = batch.select([0, 1])
    entries = benchmark.agreement(few, [1.0 - grade for grade in correct[:2]], names[:2])
    for entry in entries:
        assert [one["right"] for one in entry["disagreements"]] == [entry["verifier"]] * 2
