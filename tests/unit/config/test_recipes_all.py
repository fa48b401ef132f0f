"""Every packaged recipe resolves, is not refused, is flat and short, and names its paper; what its axes say is in it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks import fits
from hf_rlhf.axes import AXES
from hf_rlhf.config.pipeline import is_pipeline, load_pipeline
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe, read_recipe, resolve
from tests.helpers.paths import ROOT

FOLDER = ROOT / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PROMISED = list(fits.RECIPES)
OLDER_THAN_ARXIV = {
    "reinforce": "Williams, Machine Learning 8, 1992",
    "reinforce_with_baseline": "Williams, Machine Learning 8",
}


def comment(name: str) -> str:
    """The comment at the head of a recipe, on one line."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_33_recipes_are_promised():
    assert len(set(PROMISED)) == 33


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_recipe_is_there(name):
    assert name in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_resolves_and_no_plugin_refuses_it(name):
    if is_pipeline(name):
        assert load_pipeline(name).stages
        return
    recipe = load_recipe(name)
    if isinstance(recipe, OfflineRecipe):
        assert recipe.trainer().columns()
    else:
        assert recipe.algorithm().problems() == []


@pytest.mark.parametrize("name", NAMES)
def test_it_is_one_flat_file_of_fewer_than_60_lines(name):
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 121
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert first > 0, "a recipe begins with its comment"
    assert not any("#" in line for line in lines[first:]), "what there is to say stands in the comment"
    inside = r"|  +[\w-]" if is_pipeline(name) else ""
    for line in lines[first:]:
        assert re.match(rf"\w+: |\w+:$|  - \{{{inside}", line), f"not flat: {line!r}"


@pytest.mark.parametrize("name", NAMES)
def test_its_comment_names_a_paper_or_says_where_it_is_from(name):
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", comment(name)) or OLDER_THAN_ARXIV[name] in comment(name)


@pytest.mark.parametrize("name", NAMES)
def test_its_axes_stand_in_the_order_of_a_step(name):
    """The reference may stand beside the KL that reads it."""
    order = [key for key in read_recipe(name) if key in AXES and key != "reference"]
    assert order == [key for key in AXES if key in order]


def plugins(name: str) -> dict[str, Any]:
    """Place in the recipe -> plugin."""
    return dict(load_recipe(name).algorithm().plugins())


def test_recipes_hold_what_their_names_say():
    assert plugins("ppo_shared")["critic"].shares_forward
    orz = plugins("orz")
    assert (orz["advantages"].gamma, orz["advantages"].lam) == (1, 1)
    assert not any(place.startswith("kl") for place in orz)
    assert plugins("r1_zero")["reference"].moves
    assert (plugins("trpo")["policy_loss"].name, plugins("trpo")["optimizer"].name) == ("surrogate", "trpo")
    assert load_recipe("trpo").training["max_grad_norm"] == 0
    kl = plugins("stiennon2020")["kl.0"]
    assert (kl.name, kl.level, kl.estimator.name) == ("in_reward", "token", "k1")
    assert plugins("stiennon2020")["rewards.0"].name == "reward_model"
    assert plugins("christiano2017")["rewards.0"].name == "token_reward_model"
    assert plugins("prm")["rewards.0"].name == "process_reward_model"
    assert plugins("reinforce_with_baseline")["advantages.baseline"].name == "ema"
    assert len(load_recipe("gdpo").algorithm().rewards) > 1


@pytest.mark.parametrize("name", [n for n in PROMISED if n in NAMES])
def test_it_fits_the_quickstarts_task_without_a_change_of_plugins(name):
    theirs = {"math_answer": "exact_match"}
    packaged = load_recipe(name).algorithm()
    adapted = resolve(fits.fitted(name, seed=0)).algorithm()
    assert adapted.problems() == []
    changed = [(place, theirs.get(plugin.name, plugin.name)) for place, plugin in packaged.plugins()]
    assert changed == [
        (p, plugin.name) for p, plugin in adapted.plugins() if getattr(plugin, "label", None) != fits.RIGHT
    ]
