"""`hf-rlhf recipes`, `show` and `explain` in processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys

from hf_rlhf import __version__
from hf_rlhf.cli.app import app
from hf_rlhf.cli.main import add_commands
from tests.helpers.paths import ROOT
from tests.helpers.processes import warm
from tests.unit.config.test_recipe import NESTING


def cli(*arguments, **options):
    command = [sys.executable, "-m", "hf_rlhf", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_recipes_are_listed_with_their_first_line_and_shown_as_they_are():
    listed = cli("recipes").stdout
    first = (ROOT / "recipes" / "grpo.yaml").read_text().splitlines()[0].removeprefix("# ")
    assert re.search(rf"^grpo +hf_rlhf {__version__} +{re.escape(first)}$", listed, re.MULTILINE)
    assert cli("recipes", "show", "grpo").stdout == (ROOT / "recipes" / "grpo.yaml").read_text()


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
