"""`hf-rlhf recipes`, `show` and `explain` in processes of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jsonschema

from hf_rlhf import __version__
from hf_rlhf.cli.app import app
from hf_rlhf.cli.main import add_commands
from hf_rlhf.config.json_schema import HEADER
from hf_rlhf.config.recipe_yaml import read_yaml
from tests.helpers.paths import ROOT
from tests.helpers.processes import warm
from tests.unit.config.test_recipe import NESTING


def cli(*arguments, **options):
    command = [sys.executable, "-m", "hf_rlhf", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_recipes_are_listed_with_their_family_and_first_sentence_and_shown_as_they_are():
    listed = cli("recipes").stdout
    first = (ROOT / "recipes" / "grpo.yaml").read_text().splitlines()[0].removeprefix("# ")
    assert re.search(rf"^grpo +groups +hf_rlhf {__version__} +{re.escape(first)}$", listed, re.MULTILINE)
    families = {name: family for name, family, *_ in map(str.split, listed.splitlines()[1:])}
    expected = {
        "ppo": "critic",
        "reinforce": "single",
        "dr_grpo": "groups",
        "dpo": "offline",
        "instructgpt": "pipeline",
        "opd": "teacher",
        "second_chance": "turns",
    }
    assert {name: families[name] for name in expected} == expected
    assert {recipe["name"]: recipe["family"] for recipe in json.loads(cli("recipes", "--json").stdout)} == families
    assert cli("recipes", "show", "grpo").stdout == HEADER + (ROOT / "recipes" / "grpo.yaml").read_text()


def test_the_schema_is_written_beside_a_recipe_that_names_it(tmp_path):
    (tmp_path / "mine.yaml").write_text(cli("recipes", "show", "grpo").stdout)
    named = (tmp_path / "mine.yaml").read_text().splitlines()[0].partition("$schema=")[2]
    (tmp_path / "blend.py").write_text(NESTING)
    said = cli("-p", "blend.py", "schema", "--output", named, cwd=tmp_path)
    assert HEADER in said.stdout, said.stderr
    schema = json.loads((tmp_path / named).read_text())
    raw = read_yaml((tmp_path / "mine.yaml").read_text(), "mine.yaml")
    jsonschema.validate(raw, schema)
    jsonschema.validate(raw | {"advantages": {"use": "blend", "parts": []}}, schema)
    assert cli("schema", "--output", "no/folder", cwd=tmp_path).stderr.startswith("error: cannot write no/folder")


def test_show_explains_a_plugin_and_where_it_comes_from():
    shown = cli("show", "advantages", "group_norm").stdout
    assert f"advantages.group_norm, from hf_rlhf {__version__}, hf_rlhf_plugins.advantages.group_norm" in shown
    assert "2402.03300" in shown
    assert re.search(r"^eps +number > 0 +0.0001 +Added to", shown, re.MULTILINE)


def test_an_error_of_the_user_is_one_message_without_traceback(tmp_path):
    for arguments in [["recipes", "show", "gprpo"], ["show", "advantages", "gea"], ["-p", "no:nothing", "plugins"]]:
        done = cli(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr + done.stdout


def test_a_plugin_file_is_taken_before_and_after_the_command(tmp_path):
    (tmp_path / "blend.py").write_text(NESTING)
    for arguments in [
        ["-p", "./blend.py", "show", "advantages", "blend"],
        ["show", "advantages", "blend", "-p", "./blend.py"],
    ]:
        done = cli(*arguments, cwd=tmp_path)
        assert "advantages.blend, from file ./blend.py (sha256 " in done.stdout, done.stderr
    assert "./blend.py" in cli("plugins", "-p", "./blend.py", cwd=tmp_path).stdout


def test_every_command_has_help():
    add_commands()
    assert app.registered_commands
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__


def test_the_command_explains():
    command = [*warm("hf_rlhf"), "explain", "rloo", "rloo@openrlhf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "advantages.order  kl_first" in done.stdout, done.stderr
