"""`hf-rlhf evaluate`: saved models are measured as their runs measured them, and side by side on the same prompts."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hf_rlhf.cli import main
from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.data.addition_task import addition_dataset
from hf_rlhf.training import model_evaluation
from tests.helpers.processes import run_ranks
from tests.helpers.runs import save_classifier

SMALL = ["rollout.prompts=8", "rollout.num_generations=4", "evaluation.num_generations=4", "evaluation.prompts=24"]
SMALL += ["training.max_steps=2", "training.save_strategy=steps", "training.save_steps=1"]
RUNS = {"full": [], "adapter": ["model.lora={r: 4}"], "merged": ["model.lora={r: 4}", "model.save_merged=true"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of the quickstart task: all weights, an adapter, a merged adapter, TRPO, and another sampling temperature."""
    place = tmp_path_factory.mktemp("runs")
    for name, more in {**RUNS, "hot": ["evaluation.temperature=1.5"]}.items():
        train(load_recipe("quickstart", [*SMALL, *more]), str(place / name))
    task = ["model.path=builtin:addition", "dataset.path=builtin:addition", "rewards=[exact_match]"]
    train(load_recipe("trpo", [*SMALL, *task, "rollout.max_new_tokens=4"]), str(place / "trpo"))
    return {folder.name: folder for folder in place.iterdir()}


class Run:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *words: Any, code: int = 0) -> str:
        self.monkeypatch.setattr(sys, "argv", ["hf-rlhf", "evaluate", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        out, errors = self.capfd.readouterr()
        assert (stopped.value.code or 0) == code, errors
        assert "Traceback" not in out + errors
        return errors if code == 2 else out

    def json(self, *words: Any, code: int = 0) -> Any:
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capfd)


def after(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["after"]


# The same as in the run


@pytest.mark.parametrize("name", ["full", "adapter", "merged", "trpo"])
def test_a_run_is_measured_exactly_as_it_measured_itself(run, made, name):
    (found,) = run.json(made[name])["models"]
    expected = after(made[name])
    ends = {
        f"{key}{end}": x
        for key, both in found["intervals"].items()
        for end, x in zip(("_low", "_high"), both, strict=True)
    }
    if name == "merged":  # the sum of base and adapter is rounded
        assert {**found["metrics"], **ends} == pytest.approx(expected, abs=1e-6)
    else:
        assert {**found["metrics"], **ends} == expected
    assert {"accuracy", "pass@2", "pass@4", "maj@4", "rollout/length/mean"} <= found["metrics"].keys()


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_the_checkpoint_of_the_last_step_is_the_model(run, made, name):
    found = run.json(made[name] / "checkpoint-2", made[name])
    assert found["models"][0]["metrics"] == found["models"][1]["metrics"]
    assert [model["label"] for model in found["models"]] == [f"{name}/checkpoint-2", name]
    assert set(found["differences"][0]["metrics"].values()) == {0}


def test_the_model_before_training_is_measured_as_before(run, made):
    summary = json.loads((made["full"] / "summary.json").read_text())
    (found,) = run.json("builtin:addition", "--recipe", made["full"] / "recipe.yaml")["models"]
    assert found["metrics"].items() <= summary["before"].items()


def test_a_checkpoint_that_was_moved_is_measured_by_the_recipe_within(run, made, tmp_path):
    moved = (made["full"] / "checkpoint-1").rename(tmp_path / "moved")
    try:
        (found,) = run.json(moved)["models"]
    finally:
        moved.rename(made["full"] / "checkpoint-1")
    assert found["metrics"]["accuracy"] > 0


# Several models


def test_models_are_compared_on_the_same_prompts(run, made, tmp_path):
    found = run.json(
        "builtin:addition", made["full"], "--recipe", "quickstart", *SMALL[2:4], "--output", tmp_path / "out"
    )
    (difference,) = found["differences"]
    first, second = (model["metrics"] for model in found["models"])
    assert difference["prompts"] == 24
    for name, x in difference["metrics"].items():
        low, high = difference["intervals"][name]
        assert x == pytest.approx(second[name] - first[name])
        assert low <= x <= high
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"] == found["models"]
    tables = [pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist() for name in ("builtin_addition", "full")]
    assert [row["prompt"] for row in tables[0]] == [row["prompt"] for row in tables[1]]
    for rows, metrics in zip(tables, (first, second), strict=True):
        assert len(rows) == 96
        assert sum(row["reward/exact_match"] for row in rows) / 96 == metrics["accuracy"]
        assert sum(row["tokens"] for row in rows) / 96 == metrics["rollout/length/mean"]
        assert all(eval(row["prompt"].rstrip("=")) == int(row["reference"]) for row in rows)


TOGETHER = """
import sys
from hf_rlhf.cli import main
sys.argv = ["hf-rlhf", "evaluate", *{words!r}]
main.main()
"""


def test_two_processes_write_every_row_in_the_order_of_prompts(run, made, tmp_path):
    words = [str(made["full"]), "evaluation.prompts=7", "evaluation.temperature=0"]
    one, both = (run.json(*words, "--output", tmp_path / "one"), tmp_path / "both")
    said, other = run_ranks(TOGETHER.format(words=[*words, "--json", "--output", str(both)]))
    assert "evaluating" in said
    assert other == ""
    assert json.loads((both / "evaluation.json").read_text())["models"] == one["models"]
    rows = pq.read_table(both / "full.parquet")
    assert len(rows) == 7 * 4
    assert rows.equals(pq.read_table(tmp_path / "one" / "full.parquet"))


def test_rows_that_cannot_be_written_are_an_error_before_a_model_is_loaded(refused, made, tmp_path):
    (tmp_path / "file").touch()
    assert "file" in refused(made["full"], "--output", tmp_path / "file" / "below")


def test_rows_that_could_not_be_written_are_an_error(run, made, tmp_path):
    (tmp_path / "out" / "full.parquet").mkdir(parents=True)
    assert "rows of" in run(made["full"], "--output", tmp_path / "out", code=2)


def test_the_table_has_a_column_per_model_and_per_difference(run, made):
    said = run(made["full"], made["adapter"])
    assert "24 prompts, 4 completions each, by the recipe full" in said
    head, accuracy, *_ = said.splitlines()[1:]
    assert head.split("  ")[-1].strip() == "adapter - full"
    assert accuracy.startswith("accuracy ")
    assert accuracy.count(" to ") == 3


def test_one_model_at_a_time_is_in_memory(run, made, monkeypatch):
    alive: list[weakref.ref[Any]] = []
    load = model_evaluation.load_model

    def one(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        assert not [x for x in alive if x() is not None]
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(model_evaluation, "load_model", one)
    run(made["full"], made["adapter"], made["full"] / "checkpoint-1", "evaluation.prompts=2")
    assert len(alive) == 3


def test_a_run_without_rollouts_is_measured_as_the_others(run, made, tmp_path):
    train(load_recipe("sft", ["training.max_steps=1"]), str(tmp_path / "sft"))
    run.capfd.readouterr()
    found = run.json(tmp_path / "sft", made["full"], "evaluation.prompts=4")
    assert (found["recipe"], [model["label"] for model in found["models"]]) == ("full", ["sft", "full"])
    assert "samples nothing. Pass --recipe" in run(tmp_path / "sft", code=2)


# What is asked


def test_flags_and_overrides_choose_dataset_sampling_and_seed(run, made, tmp_path):
    rows = [dict(row) for row in addition_dataset()[1]][:6]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [made["full"], "--dataset", tmp_path / "test.jsonl", "--num_generations", "2"]
    found = run.json(*words)
    assert found["models"][0]["prompts"] == 6
    assert {"pass@2", "maj@2"} <= found["models"][0]["metrics"].keys()
    greedy = [run.json(*words, "--temperature", "0", "--seed", seed)["models"] for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    other = run.json(*words, "rewards.1={use: length, target: 1, maximum: 9}", "--seed", "5")
    assert "reward/length/mean" in other["models"][0]["metrics"]
    assert other["seed"] == 5


def test_a_row_that_cannot_be_scored_makes_the_exit_code_1(run, made, tmp_path):
    (tmp_path / "own.py").write_text("def fails(rollouts):\n    raise ValueError('not today')\n")
    words = [f"rewards.1={{use: function, function: {tmp_path}/own.py:fails, on_error: none, label: own}}"]
    found = run.json(made["full"], "evaluation.prompts=2", *words, code=1)
    assert found["models"][0]["metrics"]["health/reward_error"] == 8


# What is refused, before a model is loaded


@pytest.fixture
def refused(run, monkeypatch):
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(model_evaluation, "load_model", never)
    return lambda *words: run(*words, code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a run's folder"),
        (["nowhere"], "no model folder nowhere"),
        (["{full}", "nowhere"], "no model folder nowhere"),
        (["builtin:addition"], "Pass --recipe NAME"),
        (["builtin:addition", "--recipe", "grop"], "Did you mean 'grpo'"),
        (["builtin:addition", "--recipe", "dpo"], "samples nothing"),
        (["builtin:addition", "--recipe", "grpo"], "set dataset.path"),
        (["{full}", "{full}"], "is named twice"),
        (["{full}", "{hot}"], "differ in evaluation. Choose one with --recipe"),
        (["{full}", "kl.0.beta=0.1"], "does not change an evaluation"),
        (["{full}", "model.path=x"], "name the model"),
        (["{full}", "evaluation.promts=3"], "Did you mean 'prompts'"),
        (["{full}", "evaluation.prompts=none"], "evaluation.prompts"),
        (["{full}", "--num_generation", "3"], "num_generations"),
        (["{full}", "--dataset", "nix.jsonl"], "no dataset file or folder nix.jsonl"),
        (["{full}", "rewards.0.column=nix"], "reads nix"),
        (["{full}", "dataset.prompt=nix"], "no column 'nix'"),
        (["{full}", "dataset.path={few}", "dataset.held_out=0"], "nothing is held out"),
        (["{full}", "rollout.max_new_tokens=4000"], "lower it"),
        (["{full}", "--output", "{full}"], "already contains an evaluation"),
        (["{classifier}", "--recipe", "quickstart"], "writes nothing"),
        (["{unfinished}"], "has no final model. Evaluate its checkpoint"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(refused, made, tmp_path, words, said):
    (made["full"] / "evaluation.json").touch()
    (tmp_path / "few.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 20)
    (tmp_path / "unfinished" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "unfinished" / "recipe.yaml").write_text((made["full"] / "recipe.yaml").read_text())
    names = {**made, "classifier": save_classifier(tmp_path / "classifier"), "unfinished": tmp_path / "unfinished"}
    names["few"] = tmp_path / "few.jsonl"
    assert said in refused(*(word.format(**names) for word in words))


def test_a_damaged_checkpoint_is_refused(refused, made, tmp_path):
    import shutil

    damaged = Path(shutil.copytree(made["full"] / "checkpoint-1", tmp_path / "damaged"))
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    assert "was changed" in refused(damaged)
