"""sweeps/*.yaml: Weights & Biases takes them, every parameter is a key of the recipe, and its agent runs `hf-rlhf train`."""

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
import yaml

from hf_rlhf.cli.runs.run import check
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe
from hf_rlhf.metrics.dashboard import dashboard_of
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs
from tests.helpers.paths import ROOT
from tests.helpers.processes import warm
from tests.helpers.waits import scaled

pytest.importorskip("wandb")

SWEEPS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted((ROOT / "sweeps").glob("*.yaml"))}
ENDS = {(name, key): end for name, sweep in SWEEPS.items() for key, end in sweep["parameters"].items()}


def recipe_of(sweep: dict[str, Any]) -> str:
    return sweep["command"][sweep["command"].index("train") + 1]


def ends(parameter: dict[str, Any]) -> list[Any]:
    """The values that a parameter takes, or the ends of its range."""
    if "value" in parameter:
        return [parameter["value"]]
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def at(raw: Any, path: str) -> Any:
    for key in path.split("."):
        raw = raw[int(key)] if isinstance(raw, list) else raw[key]
    return raw


@pytest.mark.parametrize("name", SWEEPS)
def test_weights_and_biases_takes_the_sweep(name):
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution

    filled = _validate_config_and_fill_distribution(SWEEPS[name])
    assert filled["parameters"].keys() == SWEEPS[name]["parameters"].keys()
    assert SWEEPS[name]["method"] in ("grid", "random", "bayes")
    assert all("values" in p or "value" in p for p in SWEEPS[name]["parameters"].values()) or filled["method"] != "grid"


@pytest.mark.parametrize(("name", "key"), ENDS)
def test_every_parameter_is_a_key_of_the_recipe_with_values_that_it_takes(name, key):
    source = recipe_of(SWEEPS[name])
    for end in ends(ENDS[name, key]):
        others = [f"{k}={ends(p)[0]}" for k, p in SWEEPS[name]["parameters"].items() if k != key]
        recipe = load_recipe(source, [*others, f"{key}={end}"])
        assert at(recipe.raw, key) == end
        if not isinstance(recipe, OfflineRecipe):
            assert not [*recipe.algorithm().problems()]


@pytest.mark.parametrize("name", SWEEPS)
def test_the_metric_that_is_swept_is_one_of_the_recipe_s(name):
    assert SWEEPS[name]["metric"]["name"] in dashboard_of(load_recipe(recipe_of(SWEEPS[name]))).metrics


@pytest.mark.parametrize("name", SWEEPS)
def test_the_command_is_one_that_hf_rlhf_takes(name):
    """What W&B's own code makes of the command and of the first value of each parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    command = SWEEPS[name]["command"]
    given = {key: {"value": ends(parameter)[-1]} for key, parameter in SWEEPS[name]["parameters"].items()}
    made = create_sweep_command_args({"args": given})
    assert command[-1] == "${args_no_hyphens}"
    recipe = load_recipe(recipe_of(SWEEPS[name]), [*made["args_no_hyphens"], "training.report_to=wandb"])
    assert check(recipe).models


class Server(BaseHTTPRequestHandler):
    """Hands an agent the runs of a sweep."""

    sweep: ClassVar[dict[str, Any]]
    runs: ClassVar[list[dict[str, Any]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = json.loads(body)["query"] if self.path == "/graphql" else ""
        answer = json.dumps({"data": self.data(query)}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def data(self, query: str) -> dict[str, Any]:
        if "SweepWithRuns" in query:
            return {"project": {"sweep": {"config": yaml.safe_dump(self.sweep), "runs": {"edges": []}}}}
        if "CreateAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "Heartbeat" in query:
            found = [self.runs.pop(0)] if self.runs else []
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(found)}}
        nothing = {"edges": []}
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": nothing}}

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_the_agent_of_weights_and_biases_runs_the_training(server, tmp_path):
    model, tokenizer = tiny_policy()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in runs.problems(30)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sweep = json.loads(json.dumps(SWEEPS["grpo_lr_beta"]))
    small = ["rollout.prompts=2", "rollout.num_generations=2", "rollout.max_new_tokens=4", "rewards=[exact_match]"]
    small += ["training.max_steps=2", "training.save_strategy=no", "dataset.held_out=2"]
    sweep["command"][:1] = warm("hf_rlhf")
    place = sweep["command"].index("grpo") + 1
    sweep["command"][place:place] = small
    chosen = {key: ends(parameter)[0] for key, parameter in sweep["parameters"].items()}
    Server.sweep = sweep
    Server.runs = [
        {"type": "run", "run_id": "run1", "program": "", "args": {k: {"value": x} for k, x in chosen.items()}}
    ]
    env = {name: x for name, x in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"WANDB_BASE_URL": server, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    env |= {"MODEL": "model", "DATASET": "problems.jsonl"}
    command = [sys.executable, "-m", "wandb", "agent", "--count", "1", "me/math/sweep1"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=scaled(300))
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "outputs" / "grpo-run1"
    assert (folder / "summary.json").exists(), done.stdout + done.stderr
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert {key: at(recipe, key) for key in chosen} == chosen
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    (written,) = (tmp_path / "wandb").glob("offline-run-*-run1")
    assert next(written.glob("*.wandb")).stat().st_size > 0
