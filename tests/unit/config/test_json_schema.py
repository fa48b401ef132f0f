"""The JSON schema of recipes accepts what the product accepts and refuses what it refuses."""

from __future__ import annotations

import jsonschema
import pytest

from hf_rlhf.axes import AXES
from hf_rlhf.config.json_schema import HEADER, recipe_schema
from hf_rlhf.config.pipeline import is_pipeline, load_pipeline
from hf_rlhf.config.recipe import load_recipe, resolve
from hf_rlhf.config.recipe_yaml import read_yaml, write_yaml
from hf_rlhf.config.training_arguments import ArgumentError, check_arguments
from hf_rlhf.registry.discovery import recipe_entries
from hf_rlhf.registry.host import Host, use_host
from hf_rlhf.registry.settings_schema import settings_of
from hf_rlhf.runtime.errors import UserError
from tests.helpers.paths import ROOT
from tests.unit.config.test_recipe import NESTING

RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
GRPO = {"rollout": {"use": "generate"}, "rewards": [{"use": "exact_match"}], "advantages": {"use": "group_norm"}}
GRPO |= {"policy_loss": "ppo_clip", "aggregation": "token_mean"}
DPO = {"trainer": {"use": "dpo"}, "dataset": {"path": "pairs.jsonl"}}
STAGED = {"stages": {"a": "sft"}}
NO_SETTING = "Additional properties are not allowed"
WRONG = [
    (GRPO, {"reward": []}, "$", NO_SETTING),
    (GRPO, {"rewards": 3}, "$.rewards", "3 is not of type 'string', 'object'"),
    (GRPO, {"rewards": [{"use": "exact_mach"}]}, "$.rewards[0].use", "'exact_mach' is not valid"),
    (GRPO, {"rewards": ["exact_mach"]}, "$.rewards[0]", "'exact_mach' is not valid"),
    (GRPO, {"rewards": [{"use": "exact_match", "colum": "a"}]}, "$.rewards[0]", NO_SETTING),
    (GRPO, {"rewards": [{"weight": 1}]}, "$.rewards[0]", "'use' is a required property"),
    (GRPO, {"rewards": [{"use": "regex"}]}, "$.rewards[0]", "is a required property"),
    (GRPO, {"rewards": [{"use": "length", "unit": "lines"}]}, "$.rewards[0].unit", "is not one of"),
    (GRPO, {"rewards": [{"use": "exact_match", "clip": [1]}]}, "$.rewards[0].clip", "is not valid"),
    (GRPO, {"kl": [{"use": "in_loss", "estimator": {"use": "k4"}}]}, "$.kl[0].estimator.use", "'k4' is not valid"),
    (GRPO, {"kl": [{"use": "in_loss", "beta": "small"}]}, "$.kl[0].beta", "is not of type 'number'"),
    (GRPO, {"advantages": {"use": "group_norm", "eps": -1}}, "$.advantages.eps", "is less than or equal to"),
    (GRPO, {"policy_loss": None}, "$.policy_loss", "None is not of type"),
    (GRPO, {"critic": {"clip": 1}}, "$.critic", NO_SETTING),
    (GRPO, {"update": {"epochs": 0}}, "$.update.epochs", "0 is less than the minimum"),
    (GRPO, {"model": {"lora": {"rank": 8}}}, "$.model.lora", "is not valid under any"),
    (GRPO, {"training": {"lr": 1}}, "$.training", NO_SETTING),
    (GRPO, {"training": {"optim": "adam"}}, "$.training.optim", "is not one of"),
    (GRPO, {"training": {"fp16": True}}, "$.training.fp16", "is not one of"),
    (GRPO, {"stages": {"a": {"recipe": "sft"}}}, "$", NO_SETTING),
    (DPO, {"rewards": []}, "$", NO_SETTING),
    (DPO, {"trainer": {"use": "dpo", "loss_type": "kto"}}, "$.trainer.loss_type", "is not one of"),
    (DPO, {"dataset": {"prompt": "p"}}, "$.dataset", NO_SETTING),
    (STAGED, {"stages": {"a": {"set": {}}}}, "$.stages.a", "'recipe' is a required property"),
    (STAGED, {"stages": {"1": "sft"}}, "$.stages", "does not match"),
    (STAGED, {"stages": {"a": {"recipe": "sft", "set": {"models.path": "m"}}}}, "$.stages.a.set", "does not match"),
    (STAGED, {"stages": {"a": {"recipe": "sft", "set": {"model.paths": "m"}}}}, "$.stages.a.set", "does not match"),
]


@pytest.fixture(scope="module")
def schema():
    made = recipe_schema(Host(disable=""))
    jsonschema.Draft7Validator.check_schema(made)
    return jsonschema.Draft7Validator(made)


def refusals(schema, raw):
    return [(error.json_path, error.message) for error in schema.iter_errors(raw)]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_validates_as_written_and_as_a_run_writes_it(schema, name):
    written = read_yaml((ROOT / "recipes" / f"{name}.yaml").read_text(), name)
    dumped = (load_pipeline(name) if is_pipeline(name) else load_recipe(name)).dump()
    assert refusals(schema, written) == []
    assert refusals(schema, read_yaml(dumped, name)) == []


@pytest.mark.parametrize(("raw", "change", "place", "text"), WRONG, ids=[str(row[1]) for row in WRONG])
def test_what_is_wrong_is_refused_where_it_is_and_by_the_product_too(schema, tmp_path, raw, change, place, text):
    assert refusals(schema, raw) == []
    found = refusals(schema, raw | change)
    assert [at for at, said in found if text in said] == [place], found
    with pytest.raises((UserError, ArgumentError)):
        load(raw | change, tmp_path)


def load(raw, folder):
    """Do what a run does before it loads a model."""
    (folder / "own.yaml").write_text(write_yaml(raw))
    if is_pipeline(folder / "own.yaml"):
        return load_pipeline(folder / "own.yaml")
    return check_arguments(load_recipe(folder / "own.yaml").training_arguments(str(folder / "out")))


def test_other_spellings_of_names_are_accepted(schema):
    for use in ("group_norm", "hf_rlhf/group_norm", "hf-rlhf/group_norm"):
        assert refusals(schema, GRPO | {"advantages": use}) == []
        assert refusals(schema, GRPO | {"advantages": {"use": use, "eps": 0.1}}) == []
        assert refusals(schema, GRPO | {"advantages": {"use": use, "epsilon": 0.1}})
    assert refusals(schema, GRPO | {"kl": [{"use": "in_loss", "estimator": {"use": "k3"}}]}) == []


def test_plugins_of_files_are_in_it_with_their_groups_and_nested_plugins(tmp_path):
    (tmp_path / "blend.py").write_text(NESTING)
    host = Host(disable="")
    host.add_file(tmp_path / "blend.py")
    own = jsonschema.Draft7Validator(recipe_schema(host))
    blend = {"use": "blend", "parts": ["group_norm", {"use": "group_mean"}], "weights": [1, 2], "group": {"size": 2}}
    with use_host(host):
        resolve(GRPO | {"advantages": blend}, host)
    for use in ("blend", "blend.py/blend"):
        assert refusals(own, GRPO | {"advantages": blend | {"use": use}}) == []
    wrong = blend | {"parts": ["group_norm", {"use": "group_mean", "eps": 1}]}
    assert [place for place, _ in refusals(own, GRPO | {"advantages": wrong})] == ["$.advantages.parts[1]"]


def test_every_setting_is_described_by_its_docstring(schema):
    host, defs = Host(disable=""), schema.schema["$defs"]
    for axis in (axis for axis, base in AXES.items() if not base.axis.watches):
        for offer in host.offers(axis):
            own = defs[f"{axis}_{offer.package}_{offer.name}".replace("-", "_")]["properties"]
            settings = settings_of(host.get(axis, f"{offer.package}/{offer.name}"))
            assert {setting.name for setting in settings} == own.keys() - {"use"}
            assert all(own[setting.name]["description"] for setting in settings)
    assert defs["training"]["properties"]["learning_rate"]["description"]


def test_the_line_for_editors_is_no_part_of_a_recipes_summary(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text(HEADER + "# Dr. Who's recipe\n# of two lines. More.\nrollout: generate\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [entry.summary for entry in recipe_entries("mine", "p", "1")] == ["Dr. Who's recipe of two lines."]
