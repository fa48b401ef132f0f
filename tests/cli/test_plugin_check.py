"""`hf-rlhf plugins check`: what an author is told of a package, and that it fails where anything is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pluggy
import pytest
from typer.testing import CliRunner

from hf_rlhf import API_VERSION
from hf_rlhf.cli.app import app
from hf_rlhf.cli.main import add_commands
from hf_rlhf.conformance.subjects import entries_of
from hf_rlhf.registry.host import Host, use_host
from hf_rlhf.runtime.errors import UserError
from tests.unit.registry.test_host import SIGN, install, one  # noqa: F401

GOOD = f'hf_rlhf_api = "{API_VERSION}"\n' + SIGN.replace(
    '    name = "mine"\n',
    '    name = "mine"\n    metrics = (Metric("sign/mean", "sign", "mean sign of the returns"),)\n',
).replace("import hookimpl", "import Metric, hookimpl")
RECIPE = "# Signs.\nrollout: {use: scripted}\nrewards: [exact_match]\nadvantages: mine\n"


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Any:
    """Runs the command on a target with its own host; exit code and what was printed."""
    add_commands()

    def run(*words: str) -> tuple[int, str]:
        with use_host(Host(disable="")):
            done = CliRunner().invoke(app, ["plugins", "check", *words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout

    return run


def package(install: Any, source: str, recipe: str = RECIPE, **more: Any) -> None:  # noqa: F811
    """A package `foreign` with one estimator and one recipe."""
    points = {
        "hf_rlhf": {"advantages.mine": "foreign_pkg.plugin"},
        "hf_rlhf.recipes": {"foreign": "foreign_pkg.recipes"},
    }
    files = {"foreign_pkg/__init__.py": "", "foreign_pkg/plugin.py": source, "foreign_pkg/recipes/signs.yaml": recipe}
    install("foreign", "1.2", points, files, **more)


def test_a_good_package_has_nothing_wrong(install: Any, check: Any) -> None:  # noqa: F811
    package(install, GOOD)
    code, said = check("foreign")
    assert code == 0, said
    for part in ("foreign 1.2", "advantages.mine", f"API {API_VERSION}", "setting scale: number, default 1.0. Factor."):
        assert part in said
    assert "metric advantage/sign/mean: sign. mean sign of the returns" in said
    assert "recipe signs: it makes a valid algorithm" in said
    assert said.rstrip().endswith("All checks passed.")


def test_json_holds_every_fact(install: Any, check: Any) -> None:  # noqa: F811
    package(install, GOOD)
    code, said = check("foreign", "--json")
    found = json.loads(said)
    assert code == 0
    assert (found["package"], found["version"], found["api"], found["failed"]) == ("foreign", "1.2", API_VERSION, False)
    (plugin,) = found["plugins"]
    assert plugin["api"] == API_VERSION
    assert plugin["settings"] == [{"name": "scale", "type": "number", "default": "1.0", "doc": "Factor."}]
    assert {fact["result"] for fact in plugin["facts"]} == {"holds"}
    assert len(plugin["facts"]) > 15
    assert found["recipes"] == {"signs": []}


def test_a_fact_that_fails_fails_the_check_and_says_why(install: Any, check: Any) -> None:  # noqa: F811
    package(install, GOOD.replace("unsqueeze(1) * scored.mask", "unsqueeze(1).expand_as(scored.mask)"))
    code, said = check("foreign")
    assert code == 1
    assert "FAILS: it is 0 off the mask" in said
    assert "Multiply by the mask last" in said


def test_a_recipe_that_is_refused_fails_the_check(install: Any, check: Any) -> None:  # noqa: F811
    package(install, GOOD, RECIPE + "critic: value_head\n")
    code, said = check("foreign")
    assert code == 1
    assert "set critic.use=none" in said


def test_a_module_that_cannot_be_imported_is_a_problem(install: Any, check: Any) -> None:  # noqa: F811
    package(install, "import no_such_module_of_mine")
    code, said = check("foreign", "--json")
    (plugin,) = json.loads(said)["plugins"]
    assert code == 1
    assert "no_such_module_of_mine" in plugin["problems"][0]
    assert "-p no:foreign" in plugin["problems"][0]


def test_a_module_that_does_not_say_its_api_version_is_warned_of(tmp_path: Path, check: Any) -> None:
    (tmp_path / "mine.py").write_text(SIGN)
    code, said = check(str(tmp_path / "mine.py"))
    assert code == 0, said
    assert f'Add hf_rlhf_api = "{API_VERSION}"' in said


def test_a_plugin_with_required_settings_is_made_and_its_facts_are_left_to_its_author(
    tmp_path: Path, check: Any
) -> None:
    (tmp_path / "mine.py").write_text(GOOD.replace("scale: float = 1.0", "scale: float"))
    code, said = check(str(tmp_path / "mine.py"))
    assert code == 0
    assert "SKIPPED: the conformance kit" in said
    assert "conformance(Mine(scale=...))" in said


def test_a_hook_on_its_way_out_is_shown_to_the_author(tmp_path: Path) -> None:
    hookspec = pluggy.HookspecMarker("hf_rlhf")

    class Old:
        @hookspec(warn_on_impl=DeprecationWarning("the hook scorers has become rewards in API 1.1"))
        def scorers(self) -> None:
            """What rewards were called."""

    (tmp_path / "mine.py").write_text(GOOD + "\n\n@hookimpl\ndef scorers():\n    return []\n")
    add_commands()
    host = Host(disable="")
    host._manager.add_hookspecs(Old)
    with use_host(host):
        done = CliRunner().invoke(app, ["plugins", "check", str(tmp_path / "mine.py")])
    assert done.exit_code == 0, done.output
    assert "warning: the hook scorers has become rewards in API 1.1" in done.stdout


def test_a_package_that_is_not_there_gets_the_nearest(check: Any) -> None:
    with pytest.raises(UserError, match="Did you mean 'hf_rlhf'"):
        check("hf_rlfh")


def test_a_folder_is_told_how_to_install_it(tmp_path: Path, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf-rlhf-new").mkdir()
    monkeypatch.chdir(tmp_path)
    for target in ("hf-rlhf-new", "./hf-rlhf-new/"):
        with pytest.raises(UserError) as refused:
            check(target)
        assert f"Install it with `pip install -e {target}`" in str(refused.value)
    (tmp_path / "hf_rlhf").mkdir()  # beside a folder of its name, an installed package is what is meant
    assert entries_of(Host(disable=""), "hf_rlhf")
