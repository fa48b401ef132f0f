"""Estimators, losses, KLs and filters that are a function of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin, load_recipe
from hf_rlhf.runtime.errors import UserError
from tests.helpers import own_functions
from tests.helpers.runs import parameters, trainer

FILE = Path(own_functions.__file__).read_text()


@pytest.fixture
def mine(tmp_path: Path) -> Any:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    return lambda name: {"use": "function", "function": f"{file}:{name}"}


SAME: dict[str, tuple[str, Any, str]] = {
    "advantages": ("adv", "leave_one_out", "advantages"),
    "policy_loss": ("loss", "reinforce", "policy_loss"),
    "a clipped policy_loss": ("clip", "ppo_clip", "policy_loss"),
    "filters": ("keep", {"use": "too_short", "min_tokens": 3}, "filters"),
}


@pytest.mark.proves(
    "advantages.function", "policy_loss.function", "filters.function", how="invariance", tolerance="1e-6"
)
@pytest.mark.parametrize("case", SAME)
def test_a_run_with_a_function_is_that_with_the_plugin_which_says_the_same(case: str, mine: Any, tmp_path: Path):
    function, plugin, axis = SAME[case]
    found = []
    for i, chosen in enumerate((mine(function), plugin)):
        run = trainer(tmp_path / str(i), **{axis: [chosen] if axis == "filters" else chosen})
        run.train()
        found.append(parameters(run))
        run.close()
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.proves("kl_estimator.function", how="invariance", tolerance="1e-6")
def test_a_kl_is_one_too(mine: Any, tmp_path: Path):
    found = []
    for i, estimator in enumerate((mine("k3"), "k3")):
        run = trainer(
            tmp_path / str(i), kl=[{"use": "in_loss", "beta": 0.5, "estimator": estimator}], reference="frozen"
        )
        run.train()
        found.append(parameters(run))
        run.close()
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_parameters_are_needs_and_attributes_are_properties(mine: Any):
    adv = load_plugin("advantages", **renamed(mine("adv")))
    assert (adv.needs, adv.across_groups) == ({"scores"}, False)
    assert load_plugin("advantages", **renamed(mine("three"))).across_groups, "what is not said is allowed for"
    loss, clip = (load_plugin("policy_loss", **renamed(mine(name))) for name in ("loss", "clip"))
    assert (loss.needs, loss.token_level, loss.zero_without_advantage) == (set(), True, True)
    assert (clip.needs, clip.token_level, clip.zero_without_advantage) == ({"old_logps"}, False, False)


def renamed(settings: dict[str, Any]) -> dict[str, Any]:
    return {"name": settings["use"], "function": settings["function"]}


@pytest.mark.parametrize(
    ("axis", "name", "said"),
    [
        (
            "advantages",
            "three",
            r"advantage function .*three: output has the shape .*must have shape \(9, 8\), got \(3,\)",
        ),
        ("advantages", "unknown", "advantages=function needs 'colour', which this version does not provide"),
        ("policy_loss", "detached", "loss function .*detached: .*finite differences"),
    ],
)
def test_one_that_breaks_a_fact_of_its_axis_is_refused_before_a_model_loads(axis: str, name: str, said: str, mine: Any):
    from hf_rlhf.cli.runs.run import check

    recipe = load_recipe("quickstart", [f"{axis}={{use: function, function: '{mine(name)['function']}'}}"])
    with pytest.raises(UserError, match=f"(?s){said}"):
        check(recipe, forecast=False)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("rest", "advantage function .*: parameter .more must be a name that can be passed by keyword"),
        ("nothing", "has no function 'nothing'; it has: adv, loss, clip"),
    ],
)
def test_one_that_cannot_be_called_is_an_error_of_the_recipe(function: str, said: str, mine: Any):
    with pytest.raises(UserError, match=said):
        load_recipe(
            "quickstart", [f"advantages={{use: function, function: '{mine(function)['function']}'}}"]
        ).algorithm()


def test_a_function_is_part_of_the_runs_contents(mine: Any, tmp_path: Path):
    run = trainer(tmp_path / "run", advantages=mine("adv"))
    before = run._contents()["advantages.function"]
    (tmp_path / "mine.py").write_text(FILE + "\n# changed\n")
    assert before["of"].endswith("mine.py")
    assert run._contents()["advantages.function"]["hash"] != before["hash"]
    run.close()
