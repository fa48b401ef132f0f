"""`hf-rlhf new`: a package of every axis is built, installed, linted, tested and trained as it is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_rlhf import API_VERSION, load_recipe
from hf_rlhf.axes import AXES, Plugin
from hf_rlhf.cli.app import app
from hf_rlhf.cli.commands.new import command_of, package, plugin_class, write
from hf_rlhf.cli.main import add_commands
from hf_rlhf.metrics.doctor import installed
from hf_rlhf.metrics.names import under
from hf_rlhf.registry import hookspecs
from hf_rlhf.registry.api_version import stated
from hf_rlhf.registry.host import Host, use_host
from hf_rlhf.runtime.errors import UserError
from tests.helpers.vllm_stub import Stub

BUILD = """
import os, sys
from setuptools import build_meta
out, *folders = sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    build_meta.build_wheel(out)
"""
NAMES = {axis: f"own_{axis}" for axis in AXES}
RECIPE: dict[str, Any] = {
    "sampler": NAMES["sampler"],
    "rollout": {"use": "generate", "prompts": 4, "num_generations": 4, "max_new_tokens": 6, "decode_dtype": "bfloat16"},
    "environment": {"use": NAMES["environment"], "max_tokens": 32},
    "rewards": [{"use": NAMES["rewards"]}, {"use": "length", "target": 4, "weight": 0.1}],
    "kl": [
        {"use": NAMES["kl"], "estimator": NAMES["kl_estimator"]},
        {"use": "in_reward", "controller": NAMES["kl_controller"]},
    ],
    "advantages": {
        "use": "mix",
        "parts": [NAMES["advantages"], {"use": "baseline", "baseline": NAMES["baseline"]}, "centred", "gae"],
        "weights": [1.0, 1.0, 1.0, 1.0],
    },
    "critic": {"use": NAMES["critic"], "learning_rate": 0.05},
    "policy_loss": NAMES["policy_loss"],
    "rollout_correction": NAMES["rollout_correction"],
    "reference": {"use": NAMES["reference"], "first": 2},
    "optimizer": {"use": NAMES["optimizer"], "learning_rate": 0.001},
    "aggregation": NAMES["aggregation"],
    "loss_terms": [NAMES["loss_terms"]],
    "filters": [NAMES["filters"]],
    "update": {"mini_batches": 2},
    "training": {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 16},
}
"""Every new plugin in one recipe, but the trainer and the engine, which reports no log-probs to correct."""
WITH_ENGINE = {
    **RECIPE,
    "rollout": {"use": NAMES["rollout"], "prompts": 4, "num_generations": 4, "max_new_tokens": 6},
    "rollout_correction": "none",
    "training": {**RECIPE["training"], "max_steps": 2},
}


SMALLEST = '''"""Return minus its group's mean, counted where nothing is left."""

from dataclasses import dataclass

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import AdvantageEstimator
from hf_rlhf.batch import Credit


@dataclass(kw_only=True)
class Centred(AdvantageEstimator):
    """The row's return minus its group's mean, on each of its tokens."""

    name = "centred"
    needs = frozenset({"groups"})
    metrics = (Metric("at_mean_frac", "share of rows", "rows whose return is their group's mean"),)

    def __call__(self, scored):
        worth = scored.returns() - scored.group_mean(scored.returns())
        return Credit(advantages=worth.unsqueeze(1) * scored.mask, metrics={"at_mean_frac": (worth == 0).float()})


@hookimpl
def advantages():
    return [Centred]
'''
"""The module of a package that adds an estimator: metric and all, and nothing of the trainer."""
SMALLEST_PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "centred"
version = "1.0"

[project.entry-points.hf_rlhf]
"advantages.centred" = "centred"

[tool.setuptools]
py-modules = ["centred"]
"""


def run(*words: str, folder: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command of this interpreter, with the installed packages where they are given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Axis -> the folder of a new package, with `--full`."""
    add_commands()
    root = tmp_path_factory.mktemp("new")
    folders = {axis: root / f"package-{axis}" for axis in AXES}
    for axis, folder in folders.items():
        done = CliRunner().invoke(
            app, ["new", axis, NAMES[axis], "--full", "--path", str(folder), "--author", "A. Name"]
        )
        assert done.exit_code == 0, done.output
    return folders


@pytest.fixture(scope="module")
def site(written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheels of all of them are installed."""
    pytest.importorskip("pip", reason="installing wheels needs pip")
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    smallest = tmp_path_factory.mktemp("centred")
    (smallest / "pyproject.toml").write_text(SMALLEST_PROJECT)
    (smallest / "centred.py").write_text(SMALLEST)
    run("-c", BUILD, str(wheels), *map(str, written.values()), str(smallest), folder=wheels)
    made = sorted(map(str, wheels.glob("*.whl")))
    assert len(made) == len(AXES) + 1
    pip = ["-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--no-index"]
    run(*pip, "--target", str(folder), *made, folder=wheels)
    return folder


@pytest.fixture(scope="module")
def trained(site: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> dict[str, Any]:
    """The logs of three runs, in which every plugin but the trainer takes part."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 5) for b in range(1, 5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logs = {}
    with Stub(tiny_model_path) as server:
        engine = {"use": "vllm", "url": server.url, "sync": {"use": NAMES["sync"], "path": str(folder / "weights")}}
        with_server = {**WITH_ENGINE, "rollout": {**WITH_ENGINE["rollout"], **engine, "max_sampler_gap": None}}
        for name, recipe in {"all": RECIPE, "rollout": WITH_ENGINE, "sync": with_server}.items():
            made = {
                **recipe,
                "model": {"path": str(tiny_model_path)},
                "dataset": {"path": "rows.jsonl", "eval_split": None},
            }
            (folder / f"{name}.yaml").write_text(json.dumps(made))
            run("-m", "hf_rlhf", "train", f"{name}.yaml", "--output-dir", name, folder=folder, site=site)
            logs[name] = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return logs


def test_a_new_package_is_the_example_its_conformance_test_and_a_project(tmp_path: Path) -> None:
    add_commands()
    done = CliRunner().invoke(app, ["new", "advantages", "best_of", "--path", str(tmp_path / "p")])
    assert done.exit_code == 0, done.output
    found = {str(file.relative_to(tmp_path / "p")) for file in (tmp_path / "p").rglob("*") if file.is_file()}
    assert found == {"hf_rlhf_best_of.py", "tests/test_best_of.py", "pyproject.toml"}
    written = (tmp_path / "p" / "hf_rlhf_best_of.py").read_text()
    example = hookspecs.example("advantages")
    assert written == example.replace("GroupSign", "BestOf").replace("group_sign", "best_of")
    assert written != example


def test_a_full_package_holds_what_a_package_holds(written: dict[str, Path]) -> None:
    folder = written["advantages"]
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"hf_rlhf_own_advantages.py", "tests/test_own_advantages.py", "pyproject.toml", "README.md"} <= found
    assert {"LICENSE", ".github/workflows/test.yml", ".gitignore"} <= found
    assert "A. Name" in (folder / "LICENSE").read_text()


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis not in ("trainer", "doctor")])
def test_a_full_plugin_has_every_method_of_a_plugin(axis: str, written: dict[str, Path]) -> None:
    shown = {name for name, value in vars(Plugin).items() if callable(value) and not name.startswith("_")}
    assert shown <= vars(class_of(axis, written[axis])).keys()


@pytest.mark.parametrize("axis", AXES)
def test_no_placeholder_is_left_and_the_version_is_this_one(axis: str, written: dict[str, Path]) -> None:
    old, name = plugin_class(hookspecs.example(axis))
    for file in written[axis].rglob("*"):
        if file.is_file():
            text = file.read_text()
            assert not re.search(r"my_name|MyName|my-name|my_axis|MY_[A-Z]|Everything", text), file
            assert not re.search(rf'\b{old.name}\b|use: {name}\b|"{name}"', text), file
    assert stated(hookspecs.example(axis)) == API_VERSION


def test_the_new_packages_are_linted_however_long_their_names_are(tmp_path: Path) -> None:
    for name in ("ab", "x" * 30):
        for author in (None, "A. Name"):
            for axis in AXES:
                write(tmp_path / name / str(author) / axis, package(axis, name, author))
    for command in (["check"], ["format", "--check"]):
        run("-m", "ruff", *command, "--no-cache", ".", folder=tmp_path)


def test_the_new_packages_pass_their_tests(written: dict[str, Path], site: Path, tmp_path: Path) -> None:
    tests = [str(folder / "tests") for folder in written.values()]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, folder=tmp_path, site=site)
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis not in ("trainer", "doctor")])
def test_a_new_plugin_trains_and_its_metrics_are_logged(axis: str, written: dict[str, Path], trained: Any) -> None:
    log = trained.get(axis, trained["all"])
    prefix = AXES[axis].axis.metric_prefix.replace("<label>", NAMES[axis])
    for metric in class_of(axis, written[axis]).metrics:
        name = under(prefix, metric)
        values = [entry[name] for entry in log if name in entry]
        assert values, f"{name} is declared and was not logged; there are: {sorted(set().union(*log))}"
        assert metric.name != "rollouts_seen" or values == sorted(set(values)), values


def test_a_new_trainer_trains_and_its_metrics_are_logged(
    written: dict[str, Path], site: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = written["trainer"]
    recipe, *words = command_of((folder / f"hf_rlhf_{NAMES['trainer']}.py").read_text())
    more = [f"model.path={tiny_model_path}", "training.per_device_train_batch_size=4"]
    out = ["--output-dir", str(tmp_path / "out"), "--max-steps", "2"]
    run("-m", "hf_rlhf", "train", recipe, *words, *more, *out, folder=folder, site=site)
    entries = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_row_loss" in entry for entry in entries), entries


def class_of(axis: str, folder: Path) -> Any:
    """The class in a new package."""
    host = Host(disable="")
    (offer,) = host.add_file(folder / f"hf_rlhf_{NAMES[axis]}.py")
    return host.get(offer.axis, offer.name)


@pytest.mark.parametrize("axis", AXES)
def test_the_command_of_the_module_is_accepted(axis: str, written: dict[str, Path]) -> None:
    host = Host(disable="")
    file = written[axis] / f"hf_rlhf_{NAMES[axis]}.py"
    host.add_file(file)
    recipe, *words = command_of(file.read_text())
    with use_host(host):
        made = load_recipe(recipe, words)
        if axis == "trainer":
            assert made.trainer().name == NAMES[axis]
        elif axis == "doctor":
            assert NAMES[axis] in {pattern.name for pattern in installed()}
        else:
            assert made.algorithm().problems() == []
            assert NAMES[axis] in {plugin.name for _, plugin in made.algorithm().plugins()}


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_has_a_small_example(axis: str) -> None:
    text = hookspecs.example(axis)
    assert len(text.splitlines()) < 60
    assert command_of(text)


@pytest.mark.parametrize(
    ("axis", "name"), [("optimizer", "metric"), ("critic", "tensor"), ("filters", "filter"), ("baseline", "scored")]
)
def test_the_class_has_a_name_of_its_own(axis: str, name: str, tmp_path: Path) -> None:
    write(tmp_path, package(axis, name, "A. Name"))
    file = tmp_path / f"hf_rlhf_{name}.py"
    assert plugin_class(file.read_text())[0].name == f"{name.capitalize()}Plugin"
    (offer,) = Host(disable="").add_file(file)
    assert (offer.axis, offer.name) == (axis, name)
    compile((tmp_path / "tests" / f"test_{name}.py").read_text(), "test", "exec")


# What is refused


def new(*words: str) -> str:
    """What the command says where it refuses."""
    add_commands()
    done = CliRunner().invoke(app, ["new", *words])
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert "nothing is overwritten" in new("advantages", "best_of", "--path", str(tmp_path / "mine"))
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["Best", "best-of", "class", "2nd", "best__of", "x" * 31, "../up"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    assert "invalid plugin name" in new("advantages", name, "--path", str(tmp_path / "p"))


def test_a_name_that_is_taken_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    said = new("advantages", "group_norm", "--path", str(tmp_path / "p"))
    assert "already offered by hf_rlhf" in said
    assert "--taken" in said
    done = CliRunner().invoke(app, ["new", "advantages", "group_norm", "--taken", "--path", str(tmp_path / "p")])
    assert done.exit_code == 0, done.output


def test_the_name_of_an_installed_module_is_refused(tmp_path: Path) -> None:
    assert "hf_rlhf_recipes is already installed" in new("advantages", "recipes", "--path", str(tmp_path / "p"))


def test_an_axis_that_is_none_is_refused() -> None:
    assert "Did you mean 'advantages'?" in new("advantage", "best_of")


def test_without_arguments_it_lists_the_axes() -> None:
    add_commands()
    said = CliRunner().invoke(app, ["new"]).output
    assert all(axis in said for axis in AXES)


def test_a_package_with_an_estimator_and_its_metric_is_less_than_thirty_lines(trained: dict[str, Any]) -> None:
    assert len(SMALLEST.splitlines()) < 30
    assert not re.search("wandb|trainer|log", SMALLEST)
    logged = [entry["advantage/at_mean_frac"] for entry in trained["all"] if "advantage/at_mean_frac" in entry]
    assert logged
    assert all(0 <= share <= 1 for share in logged)
