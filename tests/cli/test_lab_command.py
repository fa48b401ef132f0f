"""What the lab shows: the page of the docs, the pictures, and `hf-rlhf lab`."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import hf_rlhf.cli.commands.lab
from hf_rlhf.cli.app import app
from hf_rlhf.lab import Matrix, World
from hf_rlhf.lab import matrix as matrix_module
from hf_rlhf.lab.choices import aggregations, defaults
from hf_rlhf.lab.matrix import rollout_recipes
from hf_rlhf.lab.page import _recipes, page
from hf_rlhf.lab.picture import of_matrix, save
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.errors import UserError
from tests.helpers.truths import BETA, K1, kl, lab, made

# The page


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Matrix:
    """A matrix of few choices and short completions, and one recipe."""
    chosen = [made("advantages", name) for name in ("leave_one_out", "group_norm", "reinforce")]
    kls = [[made("kl", {"beta": BETA, **x})] for x in (K1, kl("in_loss", "k1"), kl("in_loss", "exact", "sequence"))]
    monkeypatch.setattr(matrix_module, "defaults", lambda axis: chosen)
    monkeypatch.setattr(matrix_module, "kl_choices", lambda beta: kls)
    monkeypatch.setattr(matrix_module, "World", functools.partial(World, length=2))
    monkeypatch.setattr(Matrix, "_losses", [made("policy_loss", name) for name in ("reinforce", "surrogate")])
    offers = [offer for offer in get_host().recipes() if offer.name == "rloo"]
    monkeypatch.setattr(type(get_host()), "recipes", lambda self: offers)
    return Matrix()


TITLES = ("Recipes", "KL", "Advantages", "Aggregations", "Critics", "Policy losses", "The whole matrix")


def test_the_page_has_every_section_and_says_why_something_is_refused(small: Matrix):
    text = page(small.sections(), beta=BETA, seed=0, picture="lab.svg")
    assert all(f"\n## {title}\n" in text for title in TITLES)
    assert "| `rloo` | `leave_one_out` | `in_reward k1 token` |" in text
    assert "k1 in the loss has expected gradient 0" in text
    assert "exact reads the distributions of single tokens" in text
    assert "![The cosine with the goal of every combination](lab.svg)" in text


def test_the_picture_of_the_matrix_is_well_formed(small: Matrix, tmp_path: Path):
    figure = of_matrix(list(small.whole()))
    titles = [panel.get_title() for panel in figure.axes if panel.images and panel.get_title()]
    assert "token_mean" in titles
    save(figure, tmp_path / "all.svg")
    words = {element.text for element in ElementTree.parse(tmp_path / "all.svg").iter() if element.text}
    assert {"group_norm", "in_reward k1 token", "token_mean"} <= words


def names(axis: str) -> set[str]:
    """All plugins but that of the user's own functions."""
    return set(get_host().names(axis)) - {"function"}


def test_the_matrix_goes_through_every_recipe_and_every_plugin_of_its_axes():
    matrix, where = Matrix(), lab()
    rows = [where.describe(matrix.recipe(name)) for name in rollout_recipes()]
    for row, name in zip(rows, rollout_recipes(), strict=True):
        row.recipe = name
    (*_, table) = _recipes(rows)
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == rollout_recipes()
    assert {kl.estimator.name for kls in matrix.kls for kl in kls} == names("kl_estimator")
    assert {loss.name for loss in matrix._losses} == names("policy_loss")
    assert {weights.name for weights in aggregations(matrix.world)} == names("aggregation")
    estimators = [*defaults("advantages"), *matrix._changed()]
    assert {estimator.name for estimator in estimators} == names("advantages")
    baselines = {x.baseline.name for x in estimators if x.name == "baseline"}
    assert baselines == names("baseline")


# The command


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, ["lab", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_a_line_for_each_aggregation(tmp_path: Path):
    shown = invoke("rloo", "--group", "2", "--length", "2", "--picture", str(tmp_path / "rloo.svg"))
    assert "advantages leave_one_out, KL in_reward k1 token, policy loss reinforce, beta 0.3" in shown
    lines = {line.split("  ")[0]: line for line in shown.splitlines()}
    assert "E[r] - beta KL(pi||ref)" in lines["seq_mean_token_sum"]
    assert "Nearest candidates of unrecognized gradients:" in shown
    words = "".join(ElementTree.parse(tmp_path / "rloo.svg").getroot().itertext())
    assert "seq_mean_token_sum, cosine 1" in words


def test_turns_are_of_two_tokens_unless_said_otherwise():
    shown = invoke("advantages.use=turn_gae", "--turns", "2", "--group", "1")
    assert "3 tokens, at most 2 of them in each of up to 2 turns, 31 completions" in shown
    assert re.search(r"^seq_mean_token_sum +E\[r\] ", shown, re.MULTILINE)
    (row, *_) = json.loads(invoke("multi_turn_grpo", "--turns", "2", "--length", "1", "--group", "2", "--json"))
    assert (row["advantages"], row["turns"], row["length"], row["refused"]) == ("turn_group_norm", 2, 1, [])


def test_axis_choices_need_no_recipe_and_json_is_a_list_of_objects():
    words = ["advantages.use=leave_one_out", "kl.0.use=in_reward", "kl.0.estimator=k1", "--group", "2", "--json"]
    rows = json.loads(invoke(*words))
    (row,) = [row for row in rows if row["aggregation"] == "seq_mean_token_sum"]
    assert (row["advantages"], row["kl"], row["estimator"], row["level"]) == (
        "leave_one_out",
        "in_reward",
        "k1",
        "token",
    )
    assert row["objective"] == "E[r] - beta KL(pi||ref)"
    assert row["relative_error"] < 1e-9
    assert row["cosine"] == pytest.approx(1)
    assert row["variance"] > 0


def test_refused_combinations_are_computed_and_explained():
    shown = invoke("kl.0.use=in_loss", "kl.0.estimator=k1", "--length", "2")
    assert "A trainer rejects it:" in shown
    assert "k1 in the loss has expected gradient 0" in shown


def test_an_override_of_a_beta_counts():
    def betas(*words: str) -> set[float]:
        return {row["beta"] for row in json.loads(invoke("rloo", "--length", "1", "--json", *words))}

    assert betas() == {0.3}
    assert betas("kl.0.beta=0.5") == {0.5}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--picture", "a.gif"], "must end in .svg, .png, .pdf, got a.gif"),
        (["--all", "--group", "2"], "takes --seed only, got --group"),
        (["--all", "rloo"], "takes --seed only, got rloo"),
        (["--group", "20"], "rollouts to enumerate"),
        (["nonesuch"], "no recipe named"),
    ],
)
def test_wrong_words_are_explained(words: list[str], text: str):
    with pytest.raises(UserError, match=text):
        CliRunner().invoke(app, ["lab", *words], catch_exceptions=False)


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'hf_rlhf\[plots\]'"):
        CliRunner().invoke(app, ["lab", "rloo", "--picture", str(tmp_path / "a.svg")], catch_exceptions=False)


def test_the_whole_matrix_is_a_page(small: Matrix, tmp_path: Path):
    text = invoke("--all", "--seed", "1", "--picture", str(tmp_path / "all.svg"))
    assert all(f"\n## {title}\n" in text for title in TITLES)
    assert "(all.svg)" in text
    assert "seed 1" in text
    assert ElementTree.parse(tmp_path / "all.svg").getroot().tag.endswith("svg")


def test_the_whole_matrix_is_a_list(small: Matrix):
    rows = json.loads(invoke("--all", "--json"))
    keys = {
        "advantages",
        "kl",
        "estimator",
        "level",
        "aggregation",
        "objective",
        "relative_error",
        "cosine",
        "variance",
    }
    assert all(keys <= row.keys() for row in rows)
    assert {row["kl"] for row in rows} == {"in_reward", "in_loss", "none"}
    assert {row["recipe"] for row in rows} == {None, "rloo"}


def test_the_command_is_registered_without_torch():
    code = "import sys, hf_rlhf.cli.commands.lab, hf_rlhf.lab; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert hf_rlhf.cli.commands.lab.lab.__doc__


def test_distillation_prints_its_forms_and_the_gap_of_the_top_k():
    shown = invoke("--distillation", "--length", "2")
    assert "k1 as the reward" in shown
    assert "per-state KL(pi||ref)" in shown
    assert "gap to the whole vocabulary" in shown
    found = json.loads(invoke("--distillation", "--length", "2", "--json"))
    assert {"forms", "top_k"} == set(found)
    assert all(gap["gap"] > 0 for gap in found["top_k"])


@pytest.mark.parametrize("recipe", ["opd", "opd_exact", "sdft"])
def test_a_recipe_without_rewards_is_studied_without_them(recipe: str):
    shown = invoke(recipe, "--group", "2", "--length", "2")
    assert "no rewards" in shown
    assert "1/2 beta per-state KL(pi||ref)" in shown
