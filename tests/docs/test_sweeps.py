"""sweeps/*.yaml: Weights & Biases takes them and every parameter is a key of the recipe."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hf_rlhf.cli.runs.run import check
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe
from hf_rlhf.metrics.dashboard import dashboard_of
from tests.helpers.paths import ROOT

pytest.importorskip("wandb")

SWEEPS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted((ROOT / "sweeps").glob("*.yaml"))}
ENDS = {(name, key): end for name, sweep in SWEEPS.items() for key, end in sweep["parameters"].items()}


def recipe_of(sweep: dict[str, Any]) -> str:
    return sweep["command"][sweep["command"].index("train") + 1]


def ends(parameter: dict[str, Any]) -> list[Any]:
    """The values that a parameter takes, or the ends of its range."""
    if "value" in parameter:
        return [parameter["value"]]
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def at(raw: Any, path: str) -> Any:
    for key in path.split("."):
        raw = raw[int(key)] if isinstance(raw, list) else raw[key]
    return raw


@pytest.mark.parametrize("name", SWEEPS)
def test_weights_and_biases_takes_the_sweep(name):
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution

    filled = _validate_config_and_fill_distribution(SWEEPS[name])
    assert filled["parameters"].keys() == SWEEPS[name]["parameters"].keys()
    assert SWEEPS[name]["method"] in ("grid", "random", "bayes")
    assert all("values" in p or "value" in p for p in SWEEPS[name]["parameters"].values()) or filled["method"] != "grid"


@pytest.mark.parametrize(("name", "key"), ENDS)
def test_every_parameter_is_a_key_of_the_recipe_with_values_that_it_takes(name, key):
    source = recipe_of(SWEEPS[name])
    for end in ends(ENDS[name, key]):
        others = [f"{k}={ends(p)[0]}" for k, p in SWEEPS[name]["parameters"].items() if k != key]
        recipe = load_recipe(source, [*others, f"{key}={end}"])
        assert at(recipe.raw, key) == end
        if not isinstance(recipe, OfflineRecipe):
            assert not [*recipe.algorithm().problems()]


@pytest.mark.parametrize("name", SWEEPS)
def test_the_metric_that_is_swept_is_one_of_the_recipe_s(name):
    assert SWEEPS[name]["metric"]["name"] in dashboard_of(load_recipe(recipe_of(SWEEPS[name]))).metrics


@pytest.mark.parametrize("name", SWEEPS)
def test_the_command_is_one_that_hf_rlhf_takes(name):
    """What W&B's own code makes of the command and of the first value of each parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    command = SWEEPS[name]["command"]
    given = {key: {"value": ends(parameter)[-1]} for key, parameter in SWEEPS[name]["parameters"].items()}
    made = create_sweep_command_args({"args": given})
    assert command[-1] == "${args_no_hyphens}"
    recipe = load_recipe(recipe_of(SWEEPS[name]), [*made["args_no_hyphens"], "training.report_to=wandb"])
    assert check(recipe).models
