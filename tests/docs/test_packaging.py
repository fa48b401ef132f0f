"""The package is what pyproject.toml says: folders, entry points, directions of imports, and a wheel that works."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hf_rlhf.axes import AXES
from hf_rlhf.config.json_schema import HEADER
from tests.helpers.paths import ROOT
from tests.helpers.wheels import PIP, built, shared_folder

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLUGIN_FILES = [file for file in sorted((ROOT / "plugins").rglob("*.py")) if file.name != "__init__.py"]
CORE_FILES = sorted((ROOT / "hf_rlhf").rglob("*.py"))
ALLOWED_TO_PLUGINS = {"hf_rlhf", "hf_rlhf.axes", "hf_rlhf.batch", "hf_rlhf.testing"}
"""What built-in plugins, templates and examples may import of hf_rlhf."""
OUTSIDE = [
    file
    for folder in ("examples", "hf_rlhf/cli/templates", "hf_rlhf/registry/examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
]


def imports(file: Path) -> set[str]:
    """The absolute modules that a file imports anywhere in it."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in submodules if (ROOT / Path(*name.split("."))).with_suffix(".py").is_file()}
            rest = {node.module} if len(known) < len(submodules) else set()
            found.update(known | rest)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def test_every_plugin_module_has_its_entry_point_and_every_entry_point_its_module():
    modules = {file.relative_to(ROOT / "plugins").with_suffix("") for file in PLUGIN_FILES}
    on_disk = {".".join(module.parts) for module in modules if not any(part.startswith("_") for part in module.parts)}
    assert PROJECT["project"]["entry-points"]["hf_rlhf"] == {name: f"hf_rlhf_plugins.{name}" for name in on_disk}


def test_the_installed_entry_points_are_those_of_the_project():
    from hf_rlhf.registry.host import Host

    installed = {f"{o.axis}.{o.name}": o.module for o in Host(disable="").offers() if o.package == "hf_rlhf"}
    assert installed == PROJECT["project"]["entry-points"]["hf_rlhf"], "run `pip install -e .` again"


def test_plugin_folders_are_the_axes():
    folders = {file.parent.name for file in (ROOT / "plugins").glob("*/__init__.py")}
    assert folders == set(AXES)
    assert {".".join(name.split(".")[:1]) for name in PROJECT["project"]["entry-points"]["hf_rlhf"]} <= folders


def test_the_package_list_is_the_folders_on_disk():
    roots = {"hf_rlhf": "hf_rlhf", "plugins": "hf_rlhf_plugins", "recipes": "hf_rlhf_recipes"}
    on_disk = set()
    for folder, package in roots.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            on_disk.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(on_disk) == sorted(listed)
    for folder in roots:
        loose = {file.parent for file in (ROOT / folder).rglob("*.py")} - {ROOT / "hf_rlhf" / "registry" / "examples"}
        assert all((parent / "__init__.py").is_file() for parent in loose)


@pytest.mark.parametrize("file", CORE_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_core_never_imports_built_in_plugins_or_recipes(file):
    roots = {name.split(".")[0] for name in imports(file)}
    assert not roots & {"hf_rlhf_plugins", "hf_rlhf_recipes", "plugins", "recipes"}


@pytest.mark.parametrize("file", [*PLUGIN_FILES, *OUTSIDE], ids=lambda file: str(file.relative_to(ROOT)))
def test_plugins_templates_and_examples_import_only_the_public_modules(file):
    assert {name for name in imports(file) if re.match(r"hf_rlhf(\.|$)", name)} <= ALLOWED_TO_PLUGINS


def test_the_contract_of_plugins_forbids_every_module_that_is_not_public():
    (contract,) = [c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "forbidden"]
    modules = {
        path.stem for path in (ROOT / "hf_rlhf").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    public = {"__init__", "__main__", *(name.partition(".")[2] for name in ALLOWED_TO_PLUGINS)}
    assert set(contract["forbidden_modules"]) == {f"hf_rlhf.{name}" for name in modules - public}


def test_only_one_module_imports_what_trl_does_not_document():
    """What `from trl import ...` gives is documented; what lies in its modules need not be."""
    users = {
        file: {name for name in imports(file) if name.split(".")[0] == "trl"} for file in CORE_FILES + PLUGIN_FILES
    }
    deep = {file for file, names in users.items() if names - {"trl"}}
    assert deep <= {ROOT / "hf_rlhf" / "training" / "offline" / "trl_compat.py"}
    assert {file.parent.name for file, names in users.items() if names} <= {
        "contract",
        "data",
        "from_trl",
        "offline",
        "trainer",
    }


def test_files_stay_short():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in CORE_FILES + PLUGIN_FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 420} == {}


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory):
    """A wheel of the tree, installed into a folder."""
    pytest.importorskip("pip", reason="building a wheel needs pip")
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = built(shared_folder(tmp_path_factory), [ROOT])
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_the_wheel_works_elsewhere_next_to_a_foreign_package_called_recipes(wheel_site, tmp_path):
    for foreign in ["recipes", "plugins"]:
        (tmp_path / foreign).mkdir()
        (tmp_path / foreign / "__init__.py").write_text("raise ImportError('the wrong package')")
        (tmp_path / foreign / "grpo.yaml").write_text("# The wrong recipe.\n")
    code = """
import sys
import hf_rlhf
from hf_rlhf.registry.host import Host
site = sys.argv[1]
assert hf_rlhf.__file__.startswith(site), hf_rlhf.__file__
host = Host(disable="")
for offer in host.offers():
    if offer.package == "hf_rlhf":
        cls = host.get(offer.axis, f"hf_rlhf/{offer.name}")
        assert sys.modules[cls.__module__].__file__.startswith(site)
own = [recipe for recipe in host.recipes() if recipe.package == "hf_rlhf"]
assert all(str(recipe.file).startswith(site) for recipe in own)
print(",".join(recipe.name for recipe in own))
"""
    environment = {**os.environ, "PYTHONPATH": str(wheel_site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(wheel_site)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ",".join(sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml")))
    shown = [sys.executable, "-m", "hf_rlhf", "recipes", "show", "grpo"]
    done = subprocess.run(shown, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == HEADER + (ROOT / "recipes" / "grpo.yaml").read_text()
    written = [sys.executable, "-m", "hf_rlhf", "new", "trainer", "stars", "--full"]
    subprocess.run(written, env=environment, cwd=tmp_path, capture_output=True, check=True)
    assert "class Stars(OfflineTrainer)" in (tmp_path / "hf-rlhf-stars" / "hf_rlhf_stars.py").read_text()
