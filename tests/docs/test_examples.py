"""The example packages work for somebody else: as wheels, in an environment that has never seen the checkout."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest

from hf_rlhf.config.recipe_yaml import read_yaml
from tests.helpers.paths import ROOT
from tests.helpers.wheels import Environment, built, shared_folder

EXAMPLES = sorted(file.parent for file in (ROOT / "examples").glob("*/pyproject.toml"))
OFFERED = {"advantages.quantile", "rewards.similarity", "rollout.prompt_lookup"}
PLUGINS = {"advantages": "quantile", "rewards": "similarity", "rollout": "prompt_lookup"}


def project(example: Path) -> dict:
    return tomllib.loads((example / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """hf_rlhf and the examples, each installed from its wheel."""
    pytest.importorskip("pip", reason="building a wheel needs pip")
    made = Environment.made(tmp_path_factory.mktemp("environment") / "venv")
    made.install(*built(shared_folder(tmp_path_factory), [ROOT, *EXAMPLES]))
    return made


def test_there_is_a_reward_an_estimator_and_an_engine_each_in_a_package_of_its_own():
    offered = [name for example in EXAMPLES for name in project(example)["entry-points"]["hf_rlhf"]]
    assert set(offered) == OFFERED
    assert len(EXAMPLES) == len(offered)


def test_the_estimator_takes_under_30_lines_and_imports_nothing_of_the_trainer():
    file = ROOT / "examples" / "hf-rlhf-quantile" / "hf_rlhf_quantile" / "quantile.py"
    assert len(file.read_text().splitlines()) < 30
    nodes = ast.walk(ast.parse(file.read_text()))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {"dataclasses", "hf_rlhf", "hf_rlhf.axes", "hf_rlhf.batch"}


def test_the_environment_has_the_wheels_and_not_the_checkout(environment, tmp_path):
    code = (
        "import hf_rlhf, hf_rlhf_plugins, hf_rlhf_recipes, hf_rlhf_quantile, hf_rlhf_rapidfuzz, hf_rlhf_prompt_lookup, sys;"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('hf_rlhf') and '.' not in n), sep='\\n');"
        "print(*sys.path, sep='\\n')"
    )
    shown = environment.run("python", "-c", code, cwd=tmp_path).stdout.splitlines()
    assert sum(line.startswith(str(environment.folder)) for line in shown if line.endswith(".py")) == 6
    assert not [line for line in shown if line and Path(line).resolve().is_relative_to(ROOT / "hf_rlhf")]
    assert str(ROOT) not in shown


def test_installed_packages_are_listed(environment, tmp_path):
    listed = [line.split() for line in environment.run("hf-rlhf", "plugins", cwd=tmp_path).stdout.splitlines()]
    for example in EXAMPLES:
        for point in project(example)["entry-points"]["hf_rlhf"]:
            assert [*point.split("."), example.name, "0.1.0"] in listed
    assert "qae" in environment.run("hf-rlhf", "recipes", cwd=tmp_path).stdout
    schema = json.loads(environment.run("hf-rlhf", "schema", cwd=tmp_path).stdout)
    for recipe in (ROOT / "examples").glob("hf-rlhf-*/**/*.yaml"):
        jsonschema.validate(read_yaml(recipe.read_text(), recipe.name), schema)


def test_installed_packages_pass_their_own_tests_and_the_conformance_kit(environment, tmp_path):
    plain = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    files = [str(file) for example in EXAMPLES for file in (example / "tests").glob("test_*.py")]
    kits = [word for example in EXAMPLES for word in ("--hf-rlhf-plugin", example.name)]
    last = environment.run(*plain, *files, *kits, cwd=tmp_path).stdout.splitlines()[-1]
    assert re.search(r"\d{3} passed", last)
    assert "skipped" not in last


def test_the_packages_train_together(environment, tmp_path):
    command = ["hf-rlhf", "train", "quickstart", "--output-dir", "run", "--max-steps", "2", "evaluation.prompts=8"]
    chosen = ["rollout={use: prompt_lookup, prompts: 4, num_generations: 4, max_new_tokens: 4}"]
    chosen += ["rewards.0={use: similarity, column: answer}", "advantages.use=quantile"]
    environment.run(*command, *chosen, "training.logging_steps=1", cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    packages = {row["axis"]: (row["name"], row["package"]) for row in summary["plan"]["plugins"]}
    assert {axis: packages[axis][0] for axis in PLUGINS} == PLUGINS
    assert {packages[axis][1] for axis in PLUGINS} == {example.name for example in EXAMPLES}
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {name for entry in entries for name in entry}
    assert logged >= {"advantage/zero_frac", "rollout/tokens_per_forward", "reward/similarity/mean"}


def test_a_package_that_is_turned_off_is_not_there_and_says_so(environment, tmp_path):
    off = environment.run(
        "hf-rlhf", "-p", "no:hf-rlhf-quantile", "show", "advantages", "quantile", cwd=tmp_path, check=False
    )
    assert off.returncode == 2
    assert "turned off by -p no:hf-rlhf-quantile" in off.stderr
