"""Weights & Biases: an offline run of a tiny recipe read back, its dashboard, and what happens where W&B fails."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.faults.trackers import KILLS
from hf_rlhf.config.recipe import Recipe, resolve
from hf_rlhf.metrics import metrics_of
from hf_rlhf.metrics.dashboard import dashboard_of
from hf_rlhf.metrics.names import ONCE, globbed, tracked
from hf_rlhf.metrics.trackers import labels
from hf_rlhf.registry.host import Host, use_host
from hf_rlhf.runtime.wandb_account import has_account, server_problem
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs
from tests.helpers.processes import warm
from tests.helpers.waits import scaled
from tests.helpers.wandb_runs import inspect

pytest.importorskip("wandb")

RECIPE: dict[str, Any] = {
    "rollout": {"use": "generate", "prompts": 4, "num_generations": 2, "max_new_tokens": 5},
    "rewards": [
        {"use": "exact_match", "column": "answer"},
        {"use": "format", "pattern": "[ -O].*", "label": "early", "weight": 0.5},
    ],
    "kl": [
        {"use": "in_reward", "beta": 0.05, "estimator": {"use": "k1"}},
        {"use": "monitor", "estimator": {"use": "k3"}},
    ],
    "advantages": {"use": "tilted"},
    "critic": {"use": "value_head"},
    "policy_loss": {"use": "ppo_clip"},
    "reference": {"use": "frozen"},
    "aggregation": {"use": "token_mean"},
    "update": {"mini_batches": 2, "epochs": 2},
    "dataset": {"held_out": 2},
    "evaluation": {"num_generations": 2},
    "training": {"max_steps": 8, "learning_rate": 0.01, "report_to": "wandb", "run_name": "tiny"},
}
TILTED = '''
from dataclasses import dataclass, replace
from hf_rlhf import Metric, hookimpl
from hf_rlhf_plugins.advantages.gae import GAE

@dataclass(kw_only=True)
class Tilted(GAE):
    """GAE that says how many tokens did better than expected."""
    name = "tilted"
    metrics = (
        Metric("tilt", "share of tokens", "where the advantage is positive", healthy=(0.1, 0.9), unhealthy="Look at the critic."),
    )

    def __call__(self, scored):
        credit = super().__call__(scored)
        return replace(credit, metrics={"tilt": (credit.advantages > 0).float()})

@hookimpl
def advantages():
    return [Tilted]
'''
"""Somebody else's estimator, with a metric of its own and no line about W&B."""


def start(folder: Path, recipe: dict[str, Any], *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`hf-rlhf train` of a recipe on additions with a tiny model, in a process of its own."""
    model, tokenizer = tiny_policy()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in runs.problems(30)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tiny.yaml").write_text(json.dumps(recipe))
    env = {name: x for name, x in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"OMP_NUM_THREADS": "1", "WANDB_DIR": str(folder), "NETRC": str(folder / "netrc"), **environment}
    command = [*warm("hf_rlhf"), "train", "tiny.yaml", "--model", "model", *options]
    command += ["--dataset", "problems.jsonl", "--output-dir", "out"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=scaled(300))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


class SilentServer:
    """Accepts connections and says nothing, a byte at a time, or `answer`."""

    drips, answer = False, b""

    def __init__(self) -> None:
        self.socket, self.connections = socket.create_server(("127.0.0.1", 0)), list[Any]()
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                self.connections.append(self.socket.accept()[0])
                self.connections[-1].sendall(self.answer)
                for byte in b"HTTP/1.1 " * self.drips:
                    self.connections[-1].sendall(bytes([byte]))
                    time.sleep(0.1)


@pytest.fixture
def silent_server() -> Iterator[SilentServer]:
    server = SilentServer()
    yield server
    server.socket.close()


def use(what: Any, recipe: dict[str, Any]) -> Any:
    """What a function makes of a recipe where the stranger's plugin is there."""
    with use_host(Host(disable="")) as host, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tilted.py"
        file.write_text(TILTED)
        host.add_file(str(file))
        return what(recipe)


def load(recipe: dict[str, Any]) -> Recipe:
    return resolve(recipe, name="tiny")


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The folder of an offline run."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "tilted.py").write_text(TILTED)
    start(folder, RECIPE, "-p", "tilted.py", WANDB_MODE="offline")
    return folder


@pytest.fixture(scope="module")
def run(offline):
    """W&B's folder of that run."""
    (found,) = (offline / "wandb").glob("offline-run-*")
    return found


@pytest.fixture(scope="module")
def records(run):
    """Everything that W&B wrote down."""
    return inspect(run)


@pytest.fixture(scope="module")
def history(records):
    """What was logged, one mapping per call."""
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture(scope="module")
def summary(run):
    """State, config and newest numbers."""
    return inspect(run, "--summary")[0]


def test_metrics_have_their_names_under_train(history):
    names = {name for item in history for name in item}
    assert {
        "train/reward/exact_match/mean",
        "train/reward/exact_match/std",
        "train/reward/early/mean",
        "train/reward/total/mean",
        "train/reward/after_kl/mean",
        "train/reward/zero_std_frac",
        "train/kl/in_reward/k1",
        "train/kl/monitor/k3",
        "train/kl/ref",
        "train/advantage/mean",
        "train/advantage/std",
        "train/advantage/min",
        "train/advantage/max",
        "train/policy/loss",
        "train/policy/ratio",
        "train/policy/approx_kl",
        "train/policy/clip_frac/low",
        "train/policy/clip_frac/high",
        "train/policy/entropy",
        "train/policy/grad_norm",
        "train/value/loss",
        "train/value/clip_frac",
        "train/value/explained_var",
        "train/rollout/length/mean",
        "train/rollout/length/max",
        "train/rollout/truncated_frac",
        "train/time/rollout_s",
        "train/time/forward_s",
        "train/time/reward_s",
        "train/time/update_s",
        "train/perf/tokens_per_s",
        "train/health/nonfinite_step",
        "train/health/reward_missing",
    } <= names


def test_held_out_prompts_have_theirs_under_eval_before_and_after_training(history):
    evaluations = [item for item in history if "eval/accuracy" in item]
    assert [item["train/global_step"] for item in evaluations] == [0, 8]
    names = {
        "eval/reward/total/mean",
        "eval/reward/early/mean",
        "eval/rollout/length/mean",
        "eval/rollout/truncated_frac",
    }
    assert names <= evaluations[0].keys()


def test_every_optimizer_step_is_logged_once_with_the_numbers_of_the_file(offline, history):
    sent = {item["train/global_step"]: item for item in history if "train/policy/loss" in item}
    written = [json.loads(line) for line in (offline / "out" / "metrics.jsonl").read_text().splitlines()]
    entries = [entry for entry in written if "policy/loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, 9)) == list(sent)
    for entry in entries:
        for name in entry.keys() - {"step"}:
            assert sent[entry["step"]][f"train/{name}"] == pytest.approx(entry[name])


def test_the_config_holds_recipe_plan_and_manifest_with_versions(summary):
    import torch

    import hf_rlhf

    config = summary["config"]
    assert config["resolved_recipe"]["rewards"][1]["label"] == "early"
    assert config["resolved_recipe"]["model"]["path"] == "model"
    assert config["algorithm"]["advantages"]["lam"] == 0.95
    assert config["algorithm"]["update"]["epochs"] == 2
    manifest = {(offer["axis"], offer["name"]): offer for offer in config["plan"]["plugins"]}
    assert manifest["critic", "value_head"]["package"] == "hf_rlhf"
    assert manifest["critic", "value_head"]["version"] == hf_rlhf.__version__
    assert any("reference=frozen" in line for line in config["plan"]["models"])
    assert config["versions"]["torch_build"] == torch.__version__
    assert {"python", "transformers", "wandb"} <= config["versions"].keys()


def test_runs_line_up_by_group_job_tags_and_a_flat_config(records, summary):
    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert (run["run_group"], run["job_type"]) == ("tiny", "train")
    assert run["tags"] == ["tiny", "advantages=tilted", "policy_loss=ppo_clip", "kl=in_reward+monitor"]
    config = summary["config"]
    assert [config[key] for key in ("recipe", "advantages", "kl", "rewards", "critic")] == [
        *("tiny", "tilted", "in_reward+monitor", "exact_match+early", "value_head"),
    ]
    assert {"hf_rlhf/policy_loss.ppo_clip", "tilted.py/advantages.tilted"} <= {*config["plugins"].split()}


def test_labels_of_the_environment_stay_and_stages_are_a_group(monkeypatch):
    stage = {"name": "instructgpt/rm", "algorithm": {"trainer": {"use": "reward_model"}}}
    assert labels(stage) == {
        "group": "instructgpt",
        "job_type": "reward_model",
        "tags": ["instructgpt", "rm", "trainer=reward_model"],
    }
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    assert labels(stage) == {"job_type": "reward_model"}


def test_the_summary_keeps_what_is_declared_of_each_metric(records):
    kept = {
        record["metric"].get("name") or record["metric"]["glob_name"]: record["metric"].get("summary")
        for record in records
        if record["type"] == "metric"
    }
    best = {"last": True, "max": True}
    assert kept["eval/accuracy"] == best == kept["train/reward/total/mean"] == kept["eval/pass@*"]
    assert kept["train/advantage/min"] == {"last": True, "min": True}
    algorithm = use(load, RECIPE).algorithm()
    wanted = {globbed(tracked(named.name)) for named in metrics_of(algorithm) if named.name not in ONCE}
    assert kept.keys() == wanted | {"train/global_step", "*"}


def test_every_metric_of_every_panel_is_in_a_real_run_that_of_a_strangers_plugin_too(offline, history):
    dashboard = use(lambda recipe: dashboard_of(load(recipe)), RECIPE)
    logged = {name for item in history for name in item}
    assert dashboard.metrics <= logged
    assert {"train/advantage/tilt", "eval/pass@2", "eval/maj@2", "train/value/explained_var"} <= dashboard.metrics
    (panel,) = (p for s in dashboard.sections for p in s.panels if "train/advantage/tilt" in p.metrics)
    assert panel.title == "advantage/tilt (share of tokens), healthy from 0.1 to 0.9"
    assert (panel.lines, panel.axis) == ((0.1, 0.9), (0.0, 1.0))
    assert [section.table for section in dashboard.sections if section.table] == ["samples/completions"]
    assert any(name.startswith("samples/completions.") for name in logged)


def test_metrics_without_a_panel_are_few_and_known(history):
    dashboard = use(lambda recipe: dashboard_of(load(recipe)), RECIPE)
    logged = {name for item in history for name in item if not name.startswith(("_", "samples/"))}
    assert logged - dashboard.metrics == {
        *("train/epoch", "train/global_step", "train/grad_norm", "eval/samples_per_second", "eval/steps_per_second"),
        "train/reward/exact_match/answered_frac",  # only where no answer is right
    }


FLAT = {
    "rollout": {"use": "generate", "prompts": 4, "num_generations": 2, "max_new_tokens": 5},
    "rewards": [{"use": "exact_match", "column": "answer"}],
    "advantages": "group_norm",
    "dataset": {"eval_split": None},
    "training": {"max_steps": 7, "logging_steps": 1, "report_to": "wandb"},
}
"""A run in which no answer is right, and all are cut off."""


def test_each_finding_of_the_doctor_is_one_alert(tmp_path):
    start(tmp_path, FLAT, WANDB_MODE="offline")
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["findings"]
    assert {x["pattern"] for x in found} == {"no_spread", "cut_off"}
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    alerts = [record["alert"] for record in inspect(run) if record["type"] == "alert"]
    assert [x["title"] for x in alerts] == [f"{x['pattern']} ({x['metric']})" for x in found]
    for alert, finding in zip(alerts, found, strict=True):
        assert alert["level"] == "WARN"
        assert finding["text"] in alert["text"]
        assert " ".join(finding["overrides"]) in alert["text"]


def test_the_table_of_completions_grows_and_has_every_reward_and_the_advantage(run, history):
    tables = [json.loads(path.read_text()) for path in sorted(run.glob("files/media/table/samples/completions_*.json"))]
    assert len(tables) == 2  # a part for each rollout, as little time passed the second one at the end
    for table in tables:
        columns = {
            "prompt",
            "completion",
            "finish_reason",
            "reward/exact_match",
            "reward/early",
            "reward/total",
            "advantage",
        }
        assert columns <= {*table["columns"]}
        assert len(table["data"]) == 8
    written = {row[table["columns"].index("step")] for table in tables for row in table["data"]}
    assert written == {0, 4}
    parts = [item for item in history if "samples/completions._type" in item]
    assert {item["samples/completions._type"] for item in parts} == {"incremental-table-file"}
    assert [item["samples/completions.increment_num"] for item in parts] == [0, 1]  # one table in two parts
    assert [item["train/global_step"] for item in parts] == [1, 8]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds W&B's process in /proc")
def test_neither_a_server_that_does_not_answer_nor_the_death_of_its_process_stops_a_run(tmp_path, silent_server):
    (tmp_path / "kills.py").write_text(KILLS)
    rewards = [{"use": "function", "function": "kills.py:score"}]
    recipe = {**RECIPE, "advantages": "gae", "rewards": rewards, "dataset": {"held_out": 0}, "update": {}}
    online = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": silent_server.url, "WANDB_INIT_TIMEOUT": "1"}
    done = start(tmp_path, recipe, **online)
    assert len(silent_server.connections) == 1  # none of W&B's own, which took 18 s at the start and 24 s at the end
    assert f"{silent_server.url} did not answer within 1 s" in done.stderr
    assert "killed wandb-core" in done.stdout + done.stderr
    assert done.stderr.count("Weights & Biases did not start") == 1
    assert done.stderr.count("WandbTracker failed; training continues without it") == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 8
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 9), 8]


def test_a_server_answers_within_the_time_limit_or_is_not_used(silent_server):
    def problem_of(url: str, seconds: float) -> str | None:
        return server_problem(SimpleNamespace(base_url=url), seconds)

    assert problem_of(silent_server.url, 0.2) == f"{silent_server.url} did not answer within 0.2 s"
    silent_server.drips = True  # a byte at a time, so that no read times out
    assert problem_of(silent_server.url, 0.2) == f"{silent_server.url} did not answer within 0.2 s"
    assert problem_of("http://127.0.0.1:9", 5) == "http://127.0.0.1:9 cannot be reached (ConnectionError)"
    silent_server.drips = False
    silent_server.answer = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
    assert problem_of(silent_server.url, 5) is None
    assert problem_of(silent_server.url.replace("http:", "https:"), 5) is None  # W&B may know its certificate


def test_an_account_is_found_in_the_settings_or_in_the_netrc_file(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    settings = SimpleNamespace(api_key=None, identity_token_file=None, base_url="https://api.example.org")
    assert not has_account(settings)
    (tmp_path / "netrc").write_text("machine api.example.org login user password " + "0" * 40)
    assert has_account(settings)
    assert not has_account(SimpleNamespace(**{**vars(settings), "base_url": "https://other.example.org"}))
    (tmp_path / "netrc").write_text("machine")
    assert not has_account(settings)
    assert has_account(SimpleNamespace(**{**vars(settings), "api_key": "0" * 40}))
