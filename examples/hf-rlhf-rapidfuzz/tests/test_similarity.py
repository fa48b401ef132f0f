"""Numbers that follow from RapidFuzz's definition, and the contract of every reward."""

from __future__ import annotations

import pytest
from hf_rlhf_rapidfuzz import Similarity

from hf_rlhf.testing import conformance, rollouts

ANSWERS = ["forty two", "Forty-two.", "two forty", "unrelated"]


def rows(completions: list[str], reference: object = "forty two"):
    return rollouts(completions=completions, columns={"answer": [reference] * len(completions)})


@pytest.mark.parametrize("scorer", ["ratio", "token_sort_ratio"])
@pytest.mark.parametrize("fact", conformance(Similarity(), rollouts=rows(ANSWERS)), ids=str)
def test_conforms(fact, scorer):
    fact()


def test_the_reference_itself_gives_one_whatever_its_case_and_punctuation():
    assert Similarity()(rows(["forty two", "Forty-two."])) == [1.0, 1.0]
    assert Similarity(exact=True)(rows(["Forty-two."]))[0] < 1


def test_ratio_is_one_minus_insertions_and_deletions_over_both_lengths():
    assert Similarity()(rows(["forty"], "forty two")) == [pytest.approx(1 - 4 / 14)]


def test_the_order_of_words_counts_only_for_ratio():
    swapped = rows(["two forty"])
    assert Similarity(scorer="token_sort_ratio")(swapped) == [1.0]
    assert Similarity(scorer="ratio")(swapped)[0] < 1


def test_without_a_reference_there_is_no_score():
    assert Similarity()(rows(["forty two"], None)) == [None]
