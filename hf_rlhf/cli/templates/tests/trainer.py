from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_rlhf.testing import Fact, conformance, tiny_policy

from hf_rlhf_my_name import MyName

RATINGS = Path(__file__).parent / "ratings.jsonl"
ROWS = [json.loads(line) for line in RATINGS.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("fact", conformance(MyName(), rows=ROWS), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_a_rating_becomes_a_score() -> None:
    _, tokenizer = tiny_policy()
    encoded = MyName(best=4.0).encode({"text": "fine", "rating": 3}, tokenizer)
    assert encoded is not None
    assert encoded["labels"] == 0.75
    assert MyName().encode({"text": "", "rating": 3}, tokenizer) is None


def test_a_rating_that_is_no_number_is_refused() -> None:
    _, tokenizer = tiny_policy()
    with pytest.raises(ValueError, match="a number is due"):
        MyName().encode({"text": "fine", "rating": "3 stars"}, tokenizer)
