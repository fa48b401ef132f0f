"""Python and the command line: the same files, the same arguments, and no memory forecast that nobody asked for."""

from __future__ import annotations

import json
import logging
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, TrainingArguments

from hf_rlhf import RLHFTrainer, load_recipe
from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.recipe import Recipe
from hf_rlhf.config.training_arguments import DEFAULTS
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.signals import StoppedError
from hf_rlhf.testing import tiny_policy
from tests.helpers import offline_runs as off

SMALL = ["rollout.prompts=4", "rollout.num_generations=4", "rollout.max_new_tokens=5", "evaluation.prompts=8"]
TRAINING = ["training.max_steps=2", "training.use_cpu=true", "training.save_strategy=steps", "training.save_steps=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_policy():
        part.save_pretrained(folder)
    return folder


def recipe(model: Path, *words: str) -> Recipe:
    return load_recipe("quickstart", [f"model.path={model}", *SMALL, *TRAINING, *words])


@pytest.fixture(scope="module")
def both(model, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a run from the command line and of one from Python."""
    root = tmp_path_factory.mktemp("runs")
    train(recipe(model), str(root / "command"))
    chosen = recipe(model)
    trainer = RLHFTrainer(None, chosen, chosen.training_arguments(str(root / "python")))
    trainer.remove_callback(PrinterCallback)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert not (root / "python" / "summary.json").exists()
    trainer.save_model()
    trainer.close()
    return root / "command", root / "python"


def shape(value: Any) -> Any:
    """Keys all the way down, and the types of numbers and texts."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(x) for x in value] if isinstance(value, list) else type(value)


def test_python_leaves_the_files_of_the_command_line(both):
    command, python = ({str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in both)
    assert python == command
    assert {"recipe.yaml", "summary.json", "metrics.jsonl", "model.safetensors"} <= python
    assert any(name.startswith("completions/") for name in python)


def test_their_recipes_summaries_and_metrics_have_the_same_keys_and_numbers(both):
    command, python = both
    assert (python / "recipe.yaml").read_text() == (command / "recipe.yaml").read_text()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in both]
    assert shape(summaries[0]) == shape(summaries[1])
    for key in ("recipe", "model", "dataset", "rows", "before", "after", "steps", "plan", "versions"):
        assert summaries[0][key] == summaries[1][key], key
    entries = [off.lines(folder) for folder in both]
    assert [list(entry) for entry in entries[0]] == [list(entry) for entry in entries[1]]


def test_a_resumed_run_in_python_keeps_before(both, model):
    folder = both[1]
    before = json.loads((folder / "summary.json").read_text())["before"]
    chosen = recipe(model)
    trainer = RLHFTrainer(None, chosen, chosen.training_arguments(str(folder)))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    trainer.close()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["before"], summary["steps"]) == (before, 2)
    assert summary == trainer.summary


def test_recipe_yaml_holds_what_python_chose(model, tmp_path):
    chosen = load_recipe("quickstart", [*SMALL, *TRAINING])
    for name, args in (
        ("own", chosen.training_arguments(str(tmp_path / "own"), max_steps=1, learning_rate=0.25)),
        ("verbatim", TrainingArguments(str(tmp_path / "verbatim"), max_steps=1, learning_rate=0.25, use_cpu=True)),
    ):
        trainer = RLHFTrainer(str(model), chosen, args)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.close()
        written = load_recipe(tmp_path / name / "recipe.yaml")
        assert written.model.path == str(model)
        again = written.training_arguments(str(tmp_path / name))
        for field in ("max_steps", "learning_rate", *DEFAULTS, *chosen.training):
            assert getattr(again, field) == getattr(args, field), field


# Arguments


def test_a_signal_after_training_ends_the_command_with_its_code_once_the_run_is_complete(model, tmp_path, monkeypatch):
    def evaluate(trainer: Any) -> Any:
        if trainer.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return []

    monkeypatch.setattr("hf_rlhf.cli.runs.run._evaluate", evaluate)
    with pytest.raises(StoppedError, match="stopped by SIGINT after the run was complete: the model is in") as error:
        train(recipe(model), str(tmp_path))
    assert error.value.code == 130
    assert (tmp_path / "summary.json").exists()


def test_a_recipe_gives_its_training_over_the_defaults_and_under_what_is_passed(tmp_path):
    chosen = load_recipe("grpo", ["training.learning_rate=0.5", "training.logging_steps=3", "training.seed=7"])
    args = chosen.training_arguments(str(tmp_path), use_cpu=True, seed=9)
    assert (args.output_dir, args.learning_rate, args.logging_steps, args.seed) == (str(tmp_path), 0.5, 3, 9)
    assert args.per_device_train_batch_size == DEFAULTS["per_device_train_batch_size"]
    assert chosen.training_arguments(use_cpu=True).output_dir == "outputs/grpo"
    with pytest.raises(UserError, match=r"training: .*no_such"):
        chosen.training_arguments(no_such=1)


def test_without_args_the_trainer_uses_the_recipes(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = RLHFTrainer(None, recipe(model))
    trainer.close()
    assert (trainer.args.max_steps, trainer.args.logging_steps) == (2, 1)
    assert trainer.args.output_dir == "outputs/quickstart"
    assert not [remark for remark in trainer.plan.remarks if "TrainingArguments" in remark]


def test_arguments_that_are_passed_are_taken_verbatim_and_one_remark_lists_where_they_differ(model, tmp_path, caplog):
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=5, report_to="none", learning_rate=0.125)
    given = args.to_dict()
    chosen = recipe(model, "training.learning_rate=0.5")
    with caplog.at_level(logging.WARNING):
        trainer = RLHFTrainer(None, chosen, args)
    trainer.close()
    from hf_rlhf.config.training_arguments import FORCED

    forced = {*FORCED, "ddp_find_unused_parameters"}
    assert {k: v for k, v in args.to_dict().items() if k not in forced} == {
        k: v for k, v in given.items() if k not in forced
    }
    (remark,) = [remark for remark in trainer.plan.remarks if "TrainingArguments differ" in remark]
    for said in (
        "learning_rate=0.125 (recipe: 0.5)",
        "max_steps=5 (recipe: 2)",
        "logging_steps=500 (recipe: 1)",
        f"per_device_train_batch_size=8 (recipe: {chosen.training['per_device_train_batch_size']})",
        "disable_tqdm=False (recipe: True)",
    ):
        assert said in remark
    assert "report_to" not in remark  # none in both
    assert [record.getMessage() for record in caplog.records if "differ" in record.getMessage()] == [remark]


# The forecast


class AskedError(Exception):
    pass


@pytest.fixture
def no_forecast(monkeypatch) -> list[str]:
    from hf_rlhf.training import setup
    from hf_rlhf.training.offline import setup as offline

    asked = []

    def refuse(*_: Any, **__: Any) -> None:
        asked.append("forecast")
        raise AskedError

    for module in (setup, offline):
        monkeypatch.setattr(module, "estimate_memory", refuse)
    return asked


@pytest.mark.parametrize("kind", ["rollouts", "offline"])
def test_training_forecasts_memory_once_and_keeps_it_only_when_asked(kind, model, tmp_path, no_forecast):
    chosen = recipe(model) if kind == "rollouts" else off.recipe(tmp_path, "reward_model", "training.max_steps=1")
    summary = train(chosen, str(tmp_path / "plain"))
    assert summary["plan"]["memory"] == {}
    assert len(no_forecast) == 1, "for the lines that it prints"
    with pytest.raises(AskedError):
        train(chosen, str(tmp_path / "asked"), forecast=True)
    assert len(no_forecast) == 2


def test_the_plan_of_a_run_has_the_forecast_where_it_was_asked_for(model, tmp_path, capsys):
    summary = train(recipe(model), str(tmp_path / "asked"), forecast=True)
    assert summary["plan"]["memory"]["update"]["weights"] > 0
    assert re.search(r"update: [\d,]+ =", capsys.readouterr().out)
