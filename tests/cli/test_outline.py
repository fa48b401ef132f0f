"""Names in a recipe are checked against the source of plugins, without torch, and as `load_recipe` checks them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from transformers import TrainingArguments

from hf_rlhf.axes import AXES
from hf_rlhf.config import outline
from hf_rlhf.config.outline import Outline, check_names
from hf_rlhf.config.pipeline import is_pipeline
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.config.training_arguments import argument_names
from hf_rlhf.registry.host import Host, get_host
from hf_rlhf.registry.settings_schema import nested, setting_types
from hf_rlhf.runtime.errors import UserError

WRONG = {
    "recipe": ["gpro"],
    "plugin": ["grpo", "advantages.use=leave_one_uot"],
    "nested plugin": ["grpo", "kl.0.estimator.use=k9"],
    "setting": ["grpo", "policy_loss.epsilon_lw=0.1"],
    "setting of a base class": ["grpo", "rewards.0.wieght=2"],
    "key": ["grpo", "advantagse.use=gae"],
    "section": ["grpo", "dataset.pth=x"],
    "group": ["grpo", "model.lora.rank=4"],
    "argument": ["grpo", "training.learning_rat=1"],
    "trainer": ["dpo", "trainer.bta=1"],
}
"""What is misspelt -> recipe and overrides."""
CODE = """
import json, sys, time
from hf_rlhf.cli.main import main

sys.argv = ["hf-rlhf", *sys.argv[1:]]
try:
    main()
except SystemExit as stopped:
    heavy = sorted({"torch", "transformers", "pydantic"} & sys.modules.keys())
    print(json.dumps({"code": stopped.code, "heavy": heavy, "seconds": time.process_time()}))
"""


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG)
def test_a_misspelt_name_gives_the_error_of_load_recipe(words):
    name, *overrides = words
    with pytest.raises(UserError) as early:
        check_names(name, overrides)
    with pytest.raises(UserError) as late:
        load_recipe(name, overrides)
    assert str(early.value) == str(late.value)
    assert type(early.value) is type(late.value)


@pytest.mark.parametrize("words", [*WRONG.values(), ["grpo", "--learning_rat", "1"]], ids=[*WRONG, "flag"])
@pytest.mark.parametrize("command", ["train", "check"])
def test_the_command_line_refuses_it_without_torch_in_less_than_a_second_of_cpu(command, words, request):
    if command == "check" and request.node.callspec.id.split("-")[1] not in ("recipe", "setting", "flag"):
        pytest.skip("`check` reads names as `train` does; a share of them is enough")
    done = subprocess.run([sys.executable, "-c", CODE, command, *words], capture_output=True, text=True, timeout=300)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["code"] == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert not {"torch", "transformers"} & set(said["heavy"])
    assert said["seconds"] < 1


@pytest.mark.parametrize("axis", AXES)
def test_a_stand_in_has_the_settings_of_its_plugin(axis):
    host = Host(disable="")  # without the files that other tests have added
    stand_ins = Outline(host)
    for name in host.names(axis):
        entry = host.find(axis, name)
        assert outline._settings(entry.module, entry.name), f"{axis}.{name}: its source is not understood"
        real, read = setting_types(host.get(axis, name)), setting_types(stand_ins.get(axis, name))
        assert read.keys() == real.keys()
        assert {key: of_axis(hint) for key, hint in read.items()} == {key: of_axis(hint) for key, hint in real.items()}


def of_axis(hint: Any) -> Any:
    """The nested plugins that a setting holds. Groups of settings are read with the plugin itself."""
    found = nested(hint)
    return found if found and found.axis else None


def test_every_recipe_passes():
    names = {recipe.name for recipe in get_host().recipes() if not is_pipeline(recipe.name)}
    assert {"grpo", "ppo", "dpo"} <= names
    for name in names:
        check_names(name)


def test_arguments_are_read_from_the_source_of_transformers(monkeypatch):
    import dataclasses

    fields = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    monkeypatch.delitem(sys.modules, "transformers.training_args")
    assert argument_names.__wrapped__() == fields


def test_a_class_whose_source_says_too_little_is_imported(tmp_path, monkeypatch):
    entry = get_host().find("advantages", "gae")
    monkeypatch.setattr(outline, "source_of", lambda module: "")
    outline._settings.cache_clear()
    outline._tree.cache_clear()
    try:
        assert Outline(get_host()).get("advantages", "gae").__module__ == entry.module
    finally:
        outline._settings.cache_clear()
        outline._tree.cache_clear()
