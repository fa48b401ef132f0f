from __future__ import annotations

import pytest
from hf_rlhf import load_recipe
from hf_rlhf.testing import Fact, conformance, scored

from hf_rlhf_my_name import MyName


@pytest.mark.parametrize("fact", conformance(MyName()), ids=str)
def test_conforms(fact: Fact) -> None:
    fact()


def test_the_record_is_kept_and_slowly_forgotten() -> None:
    plugin = MyName(forget=0.5)
    assert plugin.report() == {}
    records = []
    for mean in (1.0, 3.0, 1.0, 1.0):
        plugin.observe({"reward/after_kl/mean": mean})
        records.append(plugin.report()["record"])
    assert records == [1.0, 3.0, 2.0, 1.5]
    assert plugin(scored(group_sizes=[2])).tolist() == [[1.5], [1.5]]


def test_the_record_of_a_few_rows_is_refused() -> None:
    given = "advantages={use: baseline, baseline: my_name}"
    few = ["rollout.prompts=2", "rollout.num_generations=2"]
    problems = load_recipe("grpo", [given, *few]).algorithm().problems()
    assert any("raise rollout.prompts" in problem for problem in problems)
