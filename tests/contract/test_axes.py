"""An axis is its base class, its hook, the field of `Algorithm` and the call in the step; all else follows from `AXES`."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import get_origin, get_type_hints

import pytest

from hf_rlhf.axes import AXES, LISTS, NESTED
from hf_rlhf.axes import Algorithm as View
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.recipe_yaml import ALGORITHM_AXES
from tests.helpers.paths import ROOT

SPELLED_OUT = {
    "hf_rlhf/axes.py": "AXES itself",
    "hf_rlhf/config/from_trl/converting.py": "a recipe",
    "hf_rlhf/conformance/tensor_inputs.py": "how the kit calls each tensor function",
    "hf_rlhf/lab/choices.py": "a recipe",
    "hf_rlhf/metrics/catalog.py": "conditions under which the core logs a metric, some named as axes",
    "hf_rlhf/metrics/trackers.py": "choices that become tags of a run",
}
"""Files in which four axes or more stand in one literal, and what that is."""

TOY = """
from dataclasses import dataclass
from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import AXES

@dataclass(kw_only=True)
class Still(AXES["toy"]):
    '''Does nothing.'''
    name = "still"

@dataclass(kw_only=True)
class Moving(AXES["toy"]):
    '''Moves.'''
    name = "moving"
    metrics = (Metric("speed", "m/s", "how fast it moves"),)
    speed: float = 1.0
    '''How fast.'''
    def report(self):
        return {"speed": self.speed}

@hookimpl
def toy():
    return [Still, Moving]
"""

WITH_TOY = """
import dataclasses, json, sys
from hf_rlhf import axes
from hf_rlhf.contract.axis import Axis

@dataclasses.dataclass(kw_only=True)
class Toy(axes.Plugin):
    axis = Axis(section="Toys", metric_prefix="toy", default="still")

axes.AXES["toy"] = Toy  # the class

from hf_rlhf.registry import hookspecs

def toy():
    '''Toys.'''

hookspecs.toy = hookspecs.hookspec(toy)  # its hook

from hf_rlhf.config import algorithm

@dataclasses.dataclass(kw_only=True)
class WithToy(algorithm.Algorithm):  # the field
    toy: Toy

algorithm.Algorithm = WithToy

from typer.testing import CliRunner
from hf_rlhf.cli.app import app
from hf_rlhf.cli import completion
from hf_rlhf.cli.main import add_commands
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.lab import run
from hf_rlhf.metrics import metrics_of
from hf_rlhf.metrics.dashboard import dashboard_of
from hf_rlhf.registry.host import get_host
from hf_rlhf.testing import conformance

get_host().add_file(sys.argv[1])
plain, moved = load_recipe("grpo"), load_recipe("grpo", ["toy={use: moving, speed: 2}"])
for fact in conformance(moved.algorithm().toy):
    fact()
add_commands()
print(json.dumps({
    "left out": plain.raw["toy"]["use"],
    "chosen": moved.algorithm().as_dict()["toy"],
    "problems": moved.algorithm().problems(),
    "metrics": [named.name for named in metrics_of(moved.algorithm()) if named.plugin == "toy.moving"],
    "dashboard": [s.name for s in dashboard_of(moved).sections if any("toy/speed" in p.title for p in s.panels)],
    "completion": list(completion._overrides({}, [], "toy.use=")),
    "listed": "toy" in CliRunner().invoke(app, ["plugins"]).output,
    "explained": CliRunner().invoke(app, ["explain", "grpo", "grpo", "toy.use=moving"]).exit_code,
    "lab": len(run("rloo", ["toy.use=moving", "aggregation=token_mean"])) > 0,
}))
"""


def test_a_new_axis_reaches_recipes_metrics_dashboards_completion_and_the_lab(tmp_path: Path) -> None:
    (tmp_path / "toys.py").write_text(TOY)
    command = [sys.executable, "-c", WITH_TOY, str(tmp_path / "toys.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "left out": "still",
        "chosen": {"use": "moving", "speed": 2.0},
        "problems": [],
        "metrics": ["toy/speed"],
        "dashboard": ["Toys"],
        "completion": ["toy.use=moving", "toy.use=still"],
        "listed": True,
        "explained": 0,
        "lab": True,
    }


def literals(file: Path) -> list[set[str]]:
    """The axes in each dict (its keys), tuple, list or set of a file."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        found.append({part.value for part in parts if isinstance(part, ast.Constant) and part.value in AXES})
    return found


def test_no_other_module_spells_out_a_table_of_axes() -> None:
    files = [*(ROOT / "hf_rlhf").rglob("*.py"), *(ROOT / "docs").glob("*.py")]
    tables = {str(file.relative_to(ROOT)) for file in files if any(len(found) > 3 for found in literals(file))}
    assert tables == set(SPELLED_OUT)


def test_an_algorithm_and_its_view_have_one_field_per_axis_of_the_step() -> None:
    own = [field.name for field in dataclasses.fields(Algorithm) if field.name != "update"]
    assert sorted(own) == sorted(ALGORITHM_AXES)
    assert set(View.__annotations__) == {*own, "update"}


@pytest.mark.parametrize("axis", ALGORITHM_AXES)
def test_an_axis_takes_many_plugins_where_its_field_is_a_list(axis: str) -> None:
    assert (get_origin(get_type_hints(Algorithm)[axis]) is list) == (axis in LISTS)


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_declares_its_place(axis: str) -> None:
    about = AXES[axis].__dict__["axis"]
    assert about.section
    assert about.metric_prefix or axis == "trainer"
    assert (axis in NESTED) == bool(about.nested)
    assert (about.default == ()) == (axis in LISTS)
