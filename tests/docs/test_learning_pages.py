"""The learning benchmark without its runs: what it repeats, what it computes from results, and the page made from them."""

from __future__ import annotations

import json

import pytest

from benchmarks import fits, learning, pages, record
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"


def made_up(recipe="grpo", seed=0, **changes):
    row = {"recipe": recipe, "seed": seed, "mark": "x", "rollouts": 60, "steps": 60, "learning_rate": 4e-4}
    row |= {
        "reward": [0.3, 0.6],
        "right": [0.3, 0.6],
        "kl": 0.6,
        "held_out": [0.3, 0.6],
        "seconds": 20.0,
    }
    return {**row, **changes}


FOUND = {
    "command": "python -m benchmarks.learning",
    "versions": {"torch": "1", "transformers": "2", "hf_rlhf": "3"},
    "runs": [made_up(), made_up(seed=1, right=[0.3, 0.7], reward=[0.3, 0.7]), made_up("rloo", right=[0.2, 0.5])],
    "curves": {"grpo": [[0.2 * i, 0.3 + 0.1 * i] for i in range(4)], "rloo": [[0.0, 0.2], [0.1, 0.5]]},
    "beta": [{"penalty": "in_loss k2", "beta": beta, **made_up("rloo", kl=1 - beta)} for beta in (0.1, 0.3)],
}


def test_the_first_and_last_tenth_are_means_of_equally_many_rollouts():
    assert learning.tenths([float(i) for i in range(40)]) == [1.5, 37.5]
    assert learning.tenths([1.0, 2.0, 4.0]) == [1.0, 4.0]


def test_what_is_there_is_not_run_again_and_a_change_of_the_recipe_is():
    found = {"runs": [made_up(mark=fits.mark(fits.fitted("grpo", 0))), made_up(seed=1)]}
    assert learning.due(found, ["grpo", "rloo"], 2, None) == ["grpo", "rloo"]
    assert learning.due(found, ["grpo"], 1, None) == []
    assert learning.due(found, ["grpo"], 1, 5) == ["grpo"]


def test_results_are_kept_after_each_recipe_with_the_mean_of_its_curves(tmp_path):
    path = tmp_path / "results" / "learning.json"
    assert learning.results(path) == {"runs": [], "curves": {}, "beta": []}
    for recipe, kl in (("grpo", 0.6), ("rloo", 0.6), ("grpo", 0.5)):
        curves = [[{"rollouts": 0.0, "right": 0.25 * seed, "kl": kl * seed}] for seed in range(2)]
        rows = [made_up(recipe, seed=seed, kl=kl, curve=curve) for seed, curve in enumerate(curves)]
        learning.keep_recipe(recipe, rows, path)
    learning.keep_beta(FOUND["beta"][0], path)
    learning.keep_beta({**FOUND["beta"][0], "kl": 0.25}, path)
    found = learning.results(path)
    rows = [made_up("rloo"), made_up("rloo", seed=1), made_up(kl=0.5), made_up(seed=1, kl=0.5)]
    assert found["runs"] == rows
    assert found["curves"] == {"grpo": [[0.25, 0.125]], "rloo": [[0.3, 0.125]]}
    assert [row["kl"] for row in found["beta"]] == [0.25]
    assert [file.name for file in path.parent.iterdir()] == ["learning.json"]


def test_results_are_written_with_six_digits_and_a_line_for_each_row(tmp_path):
    found = {"rows": [made_up(kl=1 / 3), made_up(seed=1)], "nothing": [], "texts": {"a": "x" * 200, "b": "y" * 200}}
    record.write(tmp_path / "x.json", found)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {**found, "rows": [made_up(kl=0.333333), made_up(seed=1)]}
    assert len([line for line in text.splitlines() if '"mark"' in line]) == 2
    assert max(map(len, text.splitlines())) <= record.WIDTH


def test_the_interval_of_the_mean_is_students():
    """Two numbers one apart: deviation 1/sqrt(2), t 12.706, so half a width of 12.706 / 2."""
    assert pages.interval([1.0, 2.0]) == "1.500 ± 6.353"
    assert pages.interval([1.0]) == "1.000"


def test_the_table_has_a_line_per_recipe_in_the_order_of_the_list():
    lines = pages.table(FOUND["runs"]).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| `rloo`", "| `grpo`"]
    assert "| 0.300 | 0.650 ± 0.635 | 0.350 ± 0.635 | 0.300 | same | 0.600 ± 0.000 | 60 | 0.0004 | 20 | 2 |" in lines[1]
    assert all(line in pages.page(FOUND) for line in lines)
    betas = pages.beta_table(FOUND["beta"]).splitlines()
    assert betas[0] == "| penalty | beta 0.1 | beta 0.3 |"
    assert betas[2] == "| `in_loss k2` | 0.900 (0.60) | 0.700 (0.60) |"


def test_the_picture_has_a_panel_per_recipe_with_its_mean_curve():
    panels = [panel for panel in pages.picture(FOUND["curves"]).axes if panel.lines]
    assert [panel.get_title() for panel in panels] == ["rloo", "grpo"]
    for panel in panels:
        *others, own = panel.lines
        assert len(others) == 2
        assert own.get_xydata().tolist() == FOUND["curves"][panel.get_title()]


def test_a_measurement_gives_the_start_no_kl_and_right_answers_by_text():
    import torch

    from benchmarks.watch import _visited, measured
    from hf_rlhf.data.addition_task import WarmUp, _model, addition_dataset, addition_tokenizer

    tokenizer = addition_tokenizer()
    torch.manual_seed(0)
    policy, other = (_model(WarmUp(layers=1), tokenizer).eval() for _ in range(2))
    rows = addition_dataset()[1][:8]
    assert measured(policy, policy, tokenizer, rows, 3)[1] == pytest.approx(0, abs=1e-6)
    assert measured(policy, other, tokenizer, rows, 3)[1] > 0
    eos = tokenizer.eos_token_id
    visited = _visited(torch.tensor([[9, 5, eos, 0], [9, eos, 0, 0], [9, 5, 6, 7]]), 1, eos)
    assert visited.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


@pytest.mark.skipif(not learning.RESULTS.is_file(), reason="the benchmark has not run")
def test_the_page_and_its_picture_are_made_from_the_results():
    found = learning.results()
    assert (DOCS / "learning.md").read_text(encoding="utf-8") == pages.page(found), "run the benchmark with --page"
    assert found["curves"].keys() == {row["recipe"] for row in found["runs"]}
    assert (DOCS / "learning.png").stat().st_size < 100_000


@pytest.mark.learning
def test_in_the_results_every_recipe_learns_on_three_seeds_as_it_is_today_and_beta_controls_the_kl():
    found = json.loads(learning.RESULTS.read_text())
    assert learning.due(found, list(fits.RECIPES), 3, None) == []
    assert learning.due_betas(found) == []
    assert all(row["right"][1] >= row["right"][0] + fits.MARGIN for row in found["runs"])
    for penalty in learning.PENALTIES:
        kls = [
            row["kl"]
            for beta in learning.BETAS
            for row in found["beta"]
            if (row["penalty"], row["beta"]) == (penalty, beta)
        ]
        assert len(kls) == len(learning.BETAS)
        assert kls == sorted(kls, reverse=True)
