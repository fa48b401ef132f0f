"""Dashboards: specifications, what panels show and how, the command, and what it tells Weights & Biases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from hf_rlhf.cli.app import app
from hf_rlhf.cli.main import add_commands
from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.pipeline import is_pipeline, load_pipeline
from hf_rlhf.config.recipe import OfflineRecipe, Recipe, load_recipe
from hf_rlhf.metrics import metrics_of, metrics_of_trainer, pattern
from hf_rlhf.metrics.dashboard import HIDDEN, ORDER, Dashboard, Panel, dashboard_of, dashboard_of_stages
from hf_rlhf.metrics.names import ONCE, is_open, tracked
from hf_rlhf.registry.host import OWN_PACKAGE, Host, use_host
from hf_rlhf.runtime.errors import UserError
from tests.helpers import dpo_runs, sft_runs
from tests.helpers import offline_runs as off
from tests.helpers.paths import ROOT
from tests.helpers.waits import scaled

pytest.importorskip("wandb_workspaces")
from hf_rlhf.metrics import wandb_workspace as wb

GOLDENS = {file.stem.removeprefix("dashboard_"): file for file in (ROOT / "tests" / "goldens").glob("dashboard_*.json")}
"""Recipe -> the specification of its dashboard: one recipe with rollouts, one in stages."""


@pytest.fixture(scope="module")
def made() -> dict[str, Dashboard]:
    """Recipe -> its dashboard, for every recipe of this package."""
    with use_host(Host(disable="")) as host:
        names = [recipe.name for recipe in host.recipes() if recipe.package == OWN_PACKAGE]
        return {
            name: dashboard_of_stages(load_pipeline(name)) if is_pipeline(name) else dashboard_of(load_recipe(name))
            for name in names
        }


def panels(dashboard: Dashboard) -> Iterator[Panel]:
    for section in dashboard.sections:
        yield from section.panels


def section(dashboard: Dashboard, name: str) -> tuple[Panel, ...]:
    return next((s.panels for s in dashboard.sections if s.name == name), ())


# Specifications


@pytest.mark.parametrize("name", ["grpo", "dpo_pipeline"])
def test_a_specification_equals_its_golden(name, made):
    found = wb.specification(wb.workspace_of(made[name]))
    assert found == GOLDENS[name].read_text(), f"if this is meant, write it to {GOLDENS[name]}"


def test_every_recipe_has_panels_and_its_specification_round_trips(made):
    assert len(made) > 50
    for name, dashboard in made.items():
        text = wb.specification(wb.workspace_of(dashboard))
        assert wb.specification(wb.read_specification(text)) == text, name
        sections = json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]
        kinds = {panel["viewType"] for part in sections for panel in part["panels"]}
        assert "Run History Line Plot" in kinds, name


@pytest.mark.parametrize("text", ["", "{}", '{"spec": {}}', "[1]"])
def test_what_is_no_specification_is_refused(text):
    with pytest.raises(UserError, match="not a dashboard specification"):
        wb.read_specification(text)


# What panels show


def test_sections_are_in_order_and_titles_and_ids_do_not_repeat(made):
    for name, dashboard in made.items():
        names = [s.name.rpartition(": ")[2] for s in dashboard.sections]
        if not is_pipeline(name):
            assert names == [known for known in ORDER if known in names], name
            assert names[0] == "Overview"
        for part in dashboard.sections:
            titles = [panel.title for panel in part.panels]
            assert len(set(titles)) == len(titles), f"{name}, {part.name}"
        ids = [panel._id for part in wb.workspace_of(dashboard).sections for panel in part.panels]
        assert len(set(ids)) == len(ids), name


def test_panels_show_what_is_declared_and_leave_out_what_is_named(made):
    for name, dashboard in made.items():
        if is_pipeline(name):
            continue
        recipe = load_recipe(name)
        declared = of(recipe)
        known = [pattern(tracked(each)) for each in declared]
        assert not [x for x in dashboard.metrics if not any(p.fullmatch(x) for p in known)], name
        left = {each for each in declared if not each.startswith("eval_") and not is_open(each) and each not in ONCE}
        left = {each for each in left if not HIDDEN.fullmatch(each)} - {"grad_norm", "aux_loss"}
        left = {each for each in left if not each.endswith("/answered_frac")}  # of runs without a right answer
        assert {tracked(each) for each in left} <= dashboard.metrics, name


def of(recipe: Recipe) -> list[str]:
    """Names of what a recipe logs."""
    found = (
        metrics_of_trainer(recipe.trainer()) if isinstance(recipe, OfflineRecipe) else metrics_of(recipe.algorithm())
    )
    return [named.name for named in found]


def test_only_plugins_that_a_recipe_uses_have_panels(made):
    ppo, quick = made["ppo"], made["quickstart"]
    assert {"train/value/loss", "train/kl/in_reward/k1"} <= ppo.metrics
    assert not section(quick, "Critic")
    assert not section(quick, "Loss terms")
    assert section(ppo, "Critic")
    assert section(made["dapo"], "Filters")
    assert {panel.title for panel in section(made["trpo"], "Optimizer")} >= {"optimizer/kl (nats per token)"}
    unheld = dashboard_of(load_recipe("grpo", ["dataset.held_out=0", "logging.completions=0"]))
    assert not section(unheld, "Evaluation")
    assert "Samples" not in [s.name for s in unheld.sections]


def test_evaluation_panels_follow_its_settings():
    several = dashboard_of(
        load_recipe("grpo", ["evaluation.num_generations=8", "update.ema=0.9", "evaluation.ema=true"])
    )
    wanted = {f"eval/pass@{k}" for k in (2, 4, 8)} | {"eval/maj@8", "eval/ema/accuracy", "eval/ema/pass@4"}
    assert wanted <= several.metrics
    (together,) = (p for p in section(several, "Evaluation") if "eval/pass@4" in p.metrics)
    assert together.metrics == ("eval/pass@2", "eval/pass@4", "eval/pass@8")
    two = ["rewards.1.use=numeric", "rewards.1.label=other"]
    labelled = dashboard_of(load_recipe("grpo", two))
    assert {"eval/accuracy", "eval/other/accuracy"} <= labelled.metrics
    assert "eval/math_answer/accuracy" not in labelled.metrics


def test_units_ranges_smoothing_and_reference_lines(made):
    found = {panel.title: panel for panel in panels(made["ppo"])}
    clipped = found["policy/clip_frac (share of tokens), healthy up to 0.3"]
    assert clipped.metrics == ("train/policy/clip_frac/low", "train/policy/clip_frac/high")
    assert (clipped.axis, clipped.lines, clipped.smoothed) == ((0.0, 1.0), (0.3,), True)
    ratio = found["policy/ratio (ratio), healthy from 0.8 to 1.25"]
    assert ratio.lines == (0.8, 1.25)
    assert found["rollout/length (tokens)"].axis == (0.0, None)
    assert found["health/nonfinite_step (count), healthy up to 0"].lines == ()  # the end of its axis
    assert not found["health/nonfinite_step (count), healthy up to 0"].smoothed
    assert not found["eval/reward/total/mean (reward)"].smoothed
    assert not found["time by phase (seconds)"].stacked  # several updates for each rollout
    phases = next(p for p in panels(made["grpo"]) if p.title == "time by phase (seconds)")
    assert phases.stacked
    assert len(phases.metrics) == 4


def test_what_a_plot_is_told_in_the_words_of_the_library(made):
    ratio = next(p for p in panels(made["ppo"]) if p.title.startswith("policy/ratio"))
    workspace = wb.workspace_of(Dashboard(name="one", sections=made["ppo"].sections))
    (plot,) = (p for s in workspace.sections for p in s.panels if getattr(p, "title", "") == ratio.title)
    written = plot._to_model().model_dump(by_alias=True, exclude_none=True)["config"]
    assert written["xAxis"] == "train/global_step"
    assert written["metrics"] == ["train/policy/ratio"]
    assert written["yAxisTitle"] == "ratio"
    name = "${train/policy/ratio}"
    assert written["expressions"] == [name, f"{name} * 0 + 0.8", f"{name} * 0 + 1.25"]
    assert (written["smoothingType"], written["smoothingWeight"]) == ("exponentialTimeWeighted", 0.6)
    assert workspace.settings.x_axis == "train/global_step"


def test_stages_have_sections_of_their_own(made):
    names = [s.name for s in made["instructgpt"].sections]
    assert [name for name in names if name.endswith("Overview")] == ["sft: Overview", "rm: Overview", "ppo: Overview"]
    assert "ppo: Critic" in names
    assert "ppo: Samples" in names
    assert "rm: KL" not in names


# Trainers on datasets


RUNS = {
    **{name: (lambda folder, name=name: off.recipe(folder, name, "dataset.held_out=4")) for name in off.KINDS},
    "squared_error": lambda folder: off.recipe(folder, "token_reward_model", "trainer.loss=squared_error"),
    "sft": sft_runs.recipe,
    "dpo": dpo_runs.recipe,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_trainer_logs_what_it_declares_and_its_panels_show(name, tmp_path):
    recipe = RUNS[name](tmp_path)
    train(recipe, str(tmp_path / "out"))
    logged = {key for line in off.lines(tmp_path / "out") for key in line} - {"step"}
    declared = {named.name: named.metric for named in metrics_of_trainer(recipe.trainer())}
    assert not logged - declared.keys()
    assert not {each for each, metric in declared.items() if not metric.optional} - logged
    assert dashboard_of(recipe).metrics <= {tracked(each) for each in logged}


# The command


def run(*words: str) -> Any:
    add_commands()
    return CliRunner().invoke(app, list(words))


def test_without_an_account_the_specification_is_a_file_that_the_command_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wb, "has_account", lambda: False)
    said = run("dashboard", "grpo", "kl=[]")
    assert said.exit_code == 0, said.output
    file = tmp_path / "grpo-dashboard.json"
    assert "train/kl/" not in file.read_text()
    assert "sections" in said.output
    assert run("dashboard", file.name, "--output", "again.json").exit_code == 0
    assert (tmp_path / "again.json").read_text() == file.read_text()


def test_wrong_words_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = run("dashboard", "none.json", "--output", "x.json")
    assert isinstance(refused.exception, UserError)
    assert "no file none.json" in str(refused.exception)
    refused = run("dashboard", "none.json", "kl=[]", "--output", "x.json")
    assert "overrides are for recipes" in str(refused.exception)
    refused = run("dashboard", "grpp", "--output", "x.json")
    assert "grpo" in str(refused.exception)
    monkeypatch.setattr(wb, "has_account", lambda: False)
    for name in ("grpp", "none.json"):
        refused = run("dashboard", name)
        assert isinstance(refused.exception, UserError)
        assert not refused.output  # no file is announced
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    refused = run("dashboard", "grpo", "--output", "x.json")
    assert "pip install 'hf_rlhf[dashboard]'" in str(refused.exception)
    assert not (tmp_path / "x.json").exists()


class Server(BaseHTTPRequestHandler):
    """Answers what the library asks Weights & Biases, and keeps the views that it is given."""

    views: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(body) if self.path == "/graphql" else {"query": ""}
        data: dict[str, Any] = {}
        if "upsertView" in asked["query"]:
            self.views.append(asked["variables"])
            data["upsertView"] = {"view": {"id": "1", "name": asked["variables"]["name"]}, "inserted": True}
        elif "viewer" in asked["query"]:
            nothing = {"edges": []}
            data["viewer"] = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": nothing}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words: Any) -> None:
        pass


def test_with_an_account_the_dashboard_is_saved_as_a_view_of_the_project(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    env = {name: x for name, x in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "hf_rlhf",
        "dashboard",
        str(GOLDENS["grpo"]),
        "--project",
        "math",
    ]
    try:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=scaled(180))
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{url}/me/math?nw=")
    (view,) = Server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "math", "hf_rlhf grpo")
    sent = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sent][:2] == ["Overview", "Evaluation"]
    assert all(panel["layout"] for s in sent for panel in s["panels"])
