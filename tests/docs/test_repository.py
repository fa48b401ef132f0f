"""What a contributor meets first holds: workflows, hooks and issue forms name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_rlhf.axes import AXES
from tests.helpers.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [file for file in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if file.name != "config.yml"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def jobs(file: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(file.read_text())["jobs"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_every_step_of_a_workflow_runs_a_target_or_a_script_that_exists(file):
    ran = set()
    for job in jobs(file).values():
        for line in (step["run"] for step in job["steps"] if "run" in step):
            if line.startswith("make "):
                name = line.split()[-1]
                names = job["strategy"]["matrix"]["target"] if line.endswith("${{ matrix.target }}") else [name]
                assert set(names) <= TARGETS, line
                ran |= set(names)
            else:
                assert (ROOT / line).stat().st_mode & 0o111, f"{line} cannot be executed"
    assert ran


def test_workflows_install_locked_packages_before_anything_else():
    for file in WORKFLOWS:
        for name, job in jobs(file).items():
            made = [step["run"] for step in job["steps"] if step.get("run", "").startswith("make ")]
            assert made[0] == "make PYTHON=python locked", f"{file.name}: {name}"


def test_every_locked_package_has_a_hash_and_the_version_of_constraints():
    text = (ROOT / "requirements-ci.txt").read_text()
    locked = re.split(r"\n(?=\S)", text.strip())
    assert "://" not in text
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", package) for package in locked)
    versions = {package.split("==")[0]: re.split(r"[ ;\\]", package.split("==")[1])[0] for package in locked}
    pinned = [line.split("==") for line in (ROOT / "constraints.txt").read_text().split()]
    named = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned if name != "bitsandbytes"}
    assert {name: versions.get(name) for name in named} == named


def test_unit_tests_run_on_every_python_that_is_supported():
    (file,) = (file for file in WORKFLOWS if file.stem == "checks")
    pythons = jobs(file)["unit"]["strategy"]["matrix"]["python"]
    lowest = re.search(r'requires-python = ">=(\S+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest
    assert pythons[0] == lowest[1]
    assert pythons == [f"3.{minor}" for minor in range(int(pythons[0][2:]), int(pythons[0][2:]) + len(pythons))]


def test_every_target_that_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:^|`)make (?:PYTHON=\S+ )?([a-z][a-z-]*)", text, re.MULTILINE))
    assert {"check", "test-unit", "test", "test-all"} <= named <= TARGETS


def test_every_folder_and_file_that_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:hf_rlhf|tests|plugins|recipes|docs)/[\w/.*]+)`", text)
    own = {"AXIS", "NAME"}
    missing = [name for name in named if not own & set(re.split(r"[/.]", name)) and not list(ROOT.glob(name))]
    assert named
    assert not missing


def test_pre_commit_runs_tools_of_the_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    tools = {hook["entry"].split()[0] for hook in hooks}
    assert tools == {".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/lint-imports"}
    check = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert {f"$(BIN)/{Path(tool).name}" for tool in tools} <= set(check.split())


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_an_issue_form_asks_for_something_and_gives_each_field_a_name_of_its_own(file):
    form = yaml.safe_load(file.read_text())
    assert form["name"]
    assert form["description"]
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert any(field.get("validations", {}).get("required") for field in asked)
    assert len({field["id"] for field in asked}) == len(asked)


def test_the_form_for_plugins_offers_every_axis():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "plugin.yml").read_text())
    (axes,) = (field["attributes"]["options"] for field in form["body"] if field.get("id") == "axis")
    assert axes == [*AXES, "a new axis"]
