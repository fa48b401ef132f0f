"""Recipes without rollouts: what a recipe may say, rows, what a run leaves, checkpoints and exact resume."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_rlhf import load_plugin
from hf_rlhf.cli.runs.run import check
from hf_rlhf.config.offline_sections import OfflineDataset
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe, resolve
from hf_rlhf.config.recipe_yaml import RecipeError
from hf_rlhf.data.addition_rows import demo_rows
from hf_rlhf.data.addition_task import addition_dataset
from hf_rlhf.data.offline_rows import read_rows
from hf_rlhf.data.sources import DatasetError
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training.offline.setup import make_trainer
from tests.helpers import offline_runs as off
from tests.helpers.paths import environment
from tests.helpers.processes import warm
from tests.helpers.waits import until

TRAINERS = list(off.KINDS)


# Recipes


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_recipe_is_read_back_as_it_was_written(trainer, tmp_path):
    first = load_recipe(off.KINDS[trainer])
    (tmp_path / "again.yaml").write_text(first.dump())
    again = load_recipe(tmp_path / "again.yaml")
    assert isinstance(again, OfflineRecipe)
    assert (again.raw, again.plugins, again.sections) == (first.raw, first.plugins, first.sections)
    assert list(first.raw) == ["trainer", "model", "dataset", "training"]


def test_a_trainer_beside_rollouts_is_refused_and_says_what_to_leave_out():
    with pytest.raises(RecipeError) as error:
        load_recipe("rm", ["kl.0.beta=0.1", "update.epochs=2"])
    (problem,) = error.value.problems
    assert problem[0] == "trainer"
    assert problem[1].endswith("has only trainer, model, dataset, training: leave kl, update out, or trainer")
    with pytest.raises(RecipeError, match="leave rollout, rewards, kl, advantages"):
        load_recipe("grpo", ["trainer=reward_model"])
    with pytest.raises(RecipeError, match=r"datsaet: a recipe has no such key\. Did you mean 'dataset'"):
        resolve({"trainer": "reward_model", "datsaet": {}})
    with pytest.raises(RecipeError, match=r"dataset\.streaming: dataset has no such setting"):
        load_recipe("rm", ["dataset.streaming=true"])


def test_another_trainer_drops_what_it_does_not_share():
    switched = load_recipe("rm", ["trainer.use=process_reward_model"])
    assert switched.notes == ["trainer.center_rewards_coefficient=0.01 dropped: process_reward_model has no "
                              "center_rewards_coefficient"]  # fmt: skip
    assert switched.plugins["trainer"].max_length == 1024


@pytest.mark.parametrize("words", [["explain", "rm"], ["lab", "rm"]])
def test_commands_about_algorithms_say_that_there_is_none(words):
    from hf_rlhf.cli.app import app
    from hf_rlhf.cli.main import add_commands

    add_commands()
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UserError)
    assert "the recipe rm trains on a dataset (trainer=reward_model) and has no algorithm" in str(result.exception)


def test_check_show_and_trls_flags_work_as_for_other_recipes(tmp_path):
    import hf_rlhf.cli.commands.train  # noqa: F401
    from hf_rlhf.cli.app import app

    data = off.write(tmp_path / "pairs.jsonl", off.rows("reward_model"))
    words = ["check", "rm", "--dataset_name", str(data), "--per_device_train_batch_size", "4", "--max-steps", "7"]
    result = CliRunner().invoke(app, [*words, "--gradient_accumulation_steps", "3"], catch_exceptions=False)
    assert result.exit_code == 0
    shown = {line.strip().rsplit("  ", 2)[0].split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    assert " 36 " in shown["rows to train on"]
    assert " 4 " in shown["held-out rows"]
    assert " 12 " in shown["rows per optimizer step"]
    assert " 7 " in shown["optimizer steps"]
    listed = CliRunner().invoke(app, ["show", "trainer", "reward_model"], catch_exceptions=False)
    assert "center_rewards_coefficient" in listed.stdout
    assert "class CompletionTrainer(OfflineTrainer)" in CliRunner().invoke(app, ["show", "trainer"]).stdout


def test_arguments_that_would_not_be_honoured_are_refused(tmp_path):
    wrong = ["training.fp16=true", "training.label_smoothing_factor=0.1", "training.auto_find_batch_size=true"]
    with pytest.raises(UserError) as error:
        check(off.recipe(tmp_path, "reward_model", *wrong), str(tmp_path))
    for name in ("fp16", "label_smoothing_factor", "auto_find_batch_size"):
        assert f"training.{name}=" in str(error.value)


# Rows


def rows_of(trainer: str, file: Path, **settings: Any) -> Any:
    return read_rows(OfflineDataset(path=str(file), **settings), load_plugin("trainer", trainer))


def test_rows_of_one_prompt_are_held_out_together(tmp_path):
    file = off.write(tmp_path / "rows.jsonl", off.rows("reward_model", count=200))
    train, held_out = rows_of("reward_model", file, held_out=15)
    assert (len(train), len(held_out)) == (186, 14)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert [dict(row) for row in rows_of("reward_model", file, held_out=15)[1]] == [dict(row) for row in held_out]
    assert rows_of("reward_model", file, held_out=0)[1] is None
    assert held_out.number(0) == 1 + next(
        i for i, row in enumerate(off.rows("reward_model", 200)) if row == dict(held_out[0])
    )


def test_columns_are_renamed_and_what_is_missing_is_named_before_a_model_is_looked_for(tmp_path):
    given = [
        {"question": row["prompt"], "win": row["chosen"], "lose": row["rejected"]} for row in off.rows("reward_model")
    ]
    file = off.write(tmp_path / "rows.jsonl", given)
    names = {"prompt": "question", "chosen": "win", "rejected": "lose"}
    train, _ = rows_of("reward_model", file, columns=names, held_out=0)
    assert [dict(row) for row in train] == off.rows("reward_model")
    nowhere = load_recipe("rm", [f"dataset.path={file}", "model.path=/nowhere/at/all"])
    with pytest.raises(UserError, match=r"no 'chosen', 'rejected', but lose, question, win.*dataset\.columns"):
        check(nowhere, str(tmp_path))
    with pytest.raises(DatasetError, match="has no column 'best'"):
        rows_of("reward_model", file, columns={"chosen": "best", "rejected": "lose"})


@pytest.mark.parametrize(
    ("trainer", "change", "message"),
    [
        ("reward_model", {"chosen": 5}, "chosen must be a text"),
        ("reward_model", {"margin": "x"}, "margin must be a number, got 'x'"),
        ("process_reward_model", {"completions": "ab"}, "a list of texts, one per step"),
        ("process_reward_model", {"labels": [True] * 9}, "one value per step .3., got 9"),
        (
            "process_reward_model",
            {"completions": ["a", " "], "labels": [True, False]},
            "step 2 must be a text .* got ' '",
        ),
        ("process_reward_model", {"completions": ["a\nb"], "labels": [True]}, r"step 1 must be a text .* got 'a\\nb'"),
        ("token_reward_model", {"spans": [{"start": 0, "end": 99, "label": 1}]}, "must be within"),
        ("token_reward_model", {"spans": [{"start": 0, "end": 1}]}, "a span must be .start, end, label."),
        ("token_reward_model", {"spans": [{"start": 0, "end": 1, "label": 2}]}, "between 0 and 1"),
        ("token_reward_model", {"spans": None, "labels": [1.0]}, "per token .* got 1 labels"),
    ],
)
def test_a_wrong_row_is_named_with_its_number(trainer, change, message, tmp_path):
    given = off.rows(trainer)
    given[16] = {**given[16], **change}
    if "margin" in change:
        given = [{**row, "margin": row.get("margin", 0.5)} for row in given]
    recipe = off.recipe(tmp_path, trainer, "dataset.held_out=0", given=given)
    with pytest.raises(DatasetError, match=rf"dataset, row 17 \(the first is 1\): .*{message}"):
        off.run(tmp_path, trainer, "dataset.held_out=0", given=given)
    assert recipe.rows.held_out == 0


def test_long_rows_and_rows_without_a_difference_are_dropped_and_counted(tmp_path, caplog):
    given = [*off.rows("reward_model"), {"prompt": "1?", "chosen": "a", "rejected": "a"}]
    given.append({"prompt": "2?", "chosen": "a" * 90, "rejected": "z"})
    with caplog.at_level(logging.WARNING, logger="hf_rlhf.data.offline_rows"):
        summary = off.run(tmp_path, "reward_model", "trainer.max_length=60", "dataset.held_out=0", given=given)
    assert summary["rows"] == {"train": 40, "evaluation": 0}
    assert (summary["before"], summary["after"]) == (None, None)
    assert "1 of 42 rows of the dataset have nothing to learn from: dropped" in caplog.text
    assert "1 of 42 rows of the dataset are longer than 60 tokens: dropped" in caplog.text
    with pytest.raises(DatasetError, match="the dataset has no usable row"):
        off.run(tmp_path, "reward_model", "trainer.max_length=1", "dataset.held_out=0", out="other")
    long = [{**row, "chosen": "a" * 300} for row in off.rows("reward_model")]
    with pytest.raises(DatasetError, match="are longer than 256 tokens"):  # the model's context
        off.run(tmp_path, "reward_model", "trainer.max_length=null", given=long, out="other")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_built_in_rows_hold_the_quickstarts_problems_on_their_sides(trainer):
    plugin = load_plugin("trainer", trainer)
    train, held_out = demo_rows(plugin)
    assert (train, held_out) == demo_rows(plugin)
    for own, problems in zip((train, held_out), addition_dataset(), strict=True):
        assert [row["prompt"] for row in own] == [row["prompt"] for row in problems]
    for row, problem in zip(held_out, addition_dataset()[1], strict=True):
        right = problem["answer"]
        if trainer == "reward_model":
            assert row["chosen"] == right != row["rejected"]
        elif trainer == "process_reward_model":
            assert row["labels"][1] == (row["completions"][1] == right)
        else:
            digits = [float(x == y) for x, y in zip(row["completion"], right, strict=True)]
            assert [span["label"] for span in row["spans"]] == digits
    if trainer == "process_reward_model":
        assert 0.45 < sum(sum(row["labels"]) for row in train) / (2 * len(train)) < 0.55


# Runs


def test_a_run_leaves_model_tokenizer_recipe_metrics_and_summary(tmp_path, capsys):
    words = ["training.eval_strategy=steps", "training.eval_steps=3"]
    summary = off.run(tmp_path, "reward_model", *words)
    out = tmp_path / "out"
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["rows"]) == (6, {"train": 36, "evaluation": 4})
    assert summary["before"].keys() == summary["after"].keys()
    own = load_recipe(out / "recipe.yaml")
    assert own.raw == off.recipe(tmp_path, "reward_model", *words).raw
    entries = off.lines(out)
    assert [e["step"] for e in entries if "eval_pairs/accuracy" in e] == [0, 3, 6, 6]
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert all(e["health/nonfinite_step"] == 0 for e in entries if "loss" in e)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model" not in card
    assert "use: reward_model" in card
    printed = capsys.readouterr().out
    assert "pairs/accuracy" in printed
    assert "use: reward_model, model:" in printed
    with pytest.raises(UserError, match="already contains a run"):
        off.run(tmp_path, "reward_model")


def test_a_lora_run_saves_a_whole_model(tmp_path):
    pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    off.run(tmp_path, "reward_model", "model.lora={r: 2}")
    model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not list((tmp_path / "out").glob("adapter_*"))
    before, after = off.weights(tmp_path / "model"), off.weights(tmp_path / "out")
    moved = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in moved)
    assert not any("norm" in name or "embed" in name for name in moved)
    assert model.config.num_labels == 1


def test_a_head_of_another_size_and_a_model_that_is_not_whole_are_refused(tmp_path):
    off.run(tmp_path, "process_reward_model")
    other = off.recipe(tmp_path, "token_reward_model", f"model.path={tmp_path / 'out'}")
    with pytest.raises(UserError, match=r"cannot be loaded as a token model with 1 output"):
        make_trainer(other, str(tmp_path / "x"))
    from safetensors.torch import save_file

    part = {name: x for name, x in off.weights(tmp_path / "model").items() if "layers.1.mlp" not in name}
    save_file(part, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for model\.layers\.1\.mlp"):
        off.run(tmp_path, "reward_model", out="other")


def test_new_weights_depend_on_the_seed_alone(tmp_path):
    def start(*words: str) -> torch.Tensor:
        recipe = off.recipe(tmp_path, "reward_model", *words)
        made = make_trainer(recipe, str(tmp_path / "x"))
        return made.model.score.weight

    torch.rand(5)
    assert torch.equal(start(), start())
    assert not torch.equal(start(), start("training.seed=1"))


def test_making_a_trainer_of_trl_tells_nobody(tmp_path, monkeypatch):
    from trl import RewardTrainer
    from trl.trainer import base_trainer

    told: list[Any] = []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *a, **k: told.append(k))
    monkeypatch.delenv("CI", raising=False)
    assert callable(RewardTrainer._send_telemetry)
    recipe = off.recipe(tmp_path, "reward_model")
    made = make_trainer(recipe, str(tmp_path / "x"))
    assert isinstance(made, RewardTrainer)
    assert told == []
    RewardTrainer._send_telemetry(made)
    assert len(told) == 1, "what the run leaves out is what would tell"


def test_a_step_that_is_not_finite_is_left_out_and_three_end_the_run(tmp_path):
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def __init__(self, steps: set[int]):
            self.steps, self.before = steps, {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in self.steps:
                self.before = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}

                def spoil(module: Any, inputs: Any, output: Any) -> Any:
                    output.logits = output.logits * float("nan")
                    return output

                self.hook = kwargs["model"].register_forward_hook(spoil)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step - 1 in self.steps:
                self.hook.remove()
                assert all(torch.equal(p, self.before[name]) for name, p in kwargs["model"].named_parameters())

    recipe = off.recipe(tmp_path, "token_reward_model")
    made = make_trainer(recipe, str(tmp_path / "one"), [Spoil({2})])
    made.train()
    counted = [entry["health/nonfinite_step"] for entry in made.state.log_history if "loss" in entry]
    assert counted == [0, 0, 1, 0, 0, 0]
    assert all(p.isfinite().all() for p in made.model.parameters())
    made = make_trainer(recipe, str(tmp_path / "two"), [Spoil({1, 2, 3})])
    with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
        made.train()


# Checkpoints

SAVES = ("training.save_strategy=steps", "training.save_steps=2")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_resumed_run_has_equal_bits(trainer, tmp_path):
    words = (*SAVES, "model.dtype=float32", "training.optim=adamw_torch", "training.num_train_epochs=1")
    straight = off.run(tmp_path, trainer, *words)
    kept = off.weights(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.name != "checkpoint-4":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = off.run(tmp_path, trainer, *words, resume=True)
    assert off.same(off.weights(tmp_path / "out"), kept)
    assert (resumed["before"], resumed["after"]) == (straight["before"], straight["after"])
    assert [entry["step"] for entry in off.lines(tmp_path / "out") if "loss" in entry] == [5, 6]
    again = off.run(tmp_path, trainer, *words, resume=True)  # of the last step: nothing is trained
    assert off.same(off.weights(tmp_path / "out"), kept)
    assert again["steps"] == 6


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_entry_of_several_steps_is_the_same_after_a_resume_in_its_middle(trainer, tmp_path):
    def entry() -> dict[str, float]:
        (found,) = [entry for entry in off.lines(tmp_path / "out") if "loss" in entry]
        return {name: x for name, x in found.items() if not name.startswith(("time/", "memory/", "perf/"))}

    words = (*SAVES, "training.num_train_epochs=1", "training.logging_steps=5")
    off.run(tmp_path, trainer, *words)
    straight = entry()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    off.run(tmp_path, trainer, *words, resume=True)
    assert straight["step"] == 5
    assert entry() == straight


def test_a_checkpoint_of_another_run_and_a_damaged_one_are_refused(tmp_path):
    off.run(tmp_path, "reward_model", *SAVES, "training.save_total_limit=2")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    with pytest.raises(UserError, match=r"training\.gradient_accumulation_steps: 1 in the checkpoint, 2 now"):
        off.run(tmp_path, "reward_model", *SAVES, "training.gradient_accumulation_steps=2", resume=True)
    with pytest.raises(UserError, match=r"trainer\.margin: None in the checkpoint, 0\.5 now"):
        off.run(tmp_path, "reward_model", *SAVES, "trainer.margin=0.5", resume=True)
    (out / "checkpoint-6" / "optimizer.pt").write_bytes(b"damaged")
    assert off.run(tmp_path, "reward_model", *SAVES, resume=True)["steps"] == 6


def begin(words: list[str], cwd: Path) -> subprocess.Popen[str]:
    program = [*warm("hf_rlhf"), "train", *words]
    return subprocess.Popen(
        program, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_killed_run_resumes_with_equal_bits(tmp_path):
    whole = off.recipe(tmp_path, "reward_model", *SAVES, "training.max_steps=150", "training.save_steps=30")
    (tmp_path / "killed.yaml").write_text(whole.dump())
    process = begin(["killed.yaml", "--output-dir", "killed"], tmp_path)
    until((tmp_path / "killed" / "checkpoint-30" / "rlhf_manifest.json").is_file, 120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "summary.json").exists()
    words = (*SAVES, "training.max_steps=150", "training.save_steps=30")
    straight = off.run(tmp_path, "reward_model", *words)
    resumed = off.run(tmp_path, "reward_model", *words, out="killed", resume=True)
    assert straight["steps"] == 150
    assert off.same(off.weights(tmp_path / "killed"), off.weights(tmp_path / "out"))
    assert (resumed["before"], resumed["after"]) == (straight["before"], straight["after"])
