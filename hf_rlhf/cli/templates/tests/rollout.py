from __future__ import annotations

import pytest
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_it_wants_a_correction() -> None:
    given = "rollout.use=my_name"
    (problem,) = load_recipe("grpo", [given]).algorithm().problems()
    assert "set rollout_correction.use=truncated" in problem
    corrected = load_recipe("grpo", [given, "rollout_correction.use=truncated"])
    assert corrected.algorithm().problems() == []


def test_it_reports_how_much_of_the_length_is_used() -> None:
    plugin = MyName(max_new_tokens=20)
    assert plugin.report() == {}
    plugin.observe({"rollout/length/mean": 5.0})
    assert plugin.report() == {"fill": 0.25}
