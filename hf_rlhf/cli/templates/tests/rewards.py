from __future__ import annotations

import pytest
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance, rollouts

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_it_gives_the_share_of_the_words_and_logs_what_is_missing() -> None:
    plugin = MyName(partial=0.5)
    given = rollouts(["the red fox", "red", "a dog", "fox"], columns={"answer": ["red fox", "red fox", "fox", None]})
    assert plugin(given) == [1.0, 0.25, 0.0, None]
    columns, metrics = plugin.take_logs()
    assert columns == {"missing": ["", "fox", "fox", ""]}
    assert metrics == {"complete_frac": [1.0, 0.0, 0.0]}


def test_the_same_words_twice_are_refused() -> None:
    one, other = "{use: my_name, label: a}", "{use: my_name, label: b}"
    twice = f"rewards=[{one}, {other}]"
    problems = load_recipe("grpo", [twice]).algorithm().problems()
    assert all("leave one out" in problem for problem in problems)
    assert len(problems) == 2


def test_an_empty_column_is_refused() -> None:
    with pytest.raises(ValueError, match="name the dataset column"):
        MyName(column="")
