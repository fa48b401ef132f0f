"""`hf-rlhf train` from the command line, in processes of its own: real problems, a tiny model, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from hf_rlhf import __version__
from hf_rlhf.cli import main
from hf_rlhf.config.json_schema import HEADER, recipe_schema
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.config.recipe_yaml import read_yaml
from tests.helpers.processes import ranks, warm
from tests.helpers.waits import scaled

SMALL = [
    "rollout.prompts=4",
    "rollout.num_generations=2",
    "rollout.max_new_tokens=8",
    'dataset.prompt_template="Question: {question}\\nAnswer:"',
    'rewards.0.answer_after="####"',
    "dataset.held_out=4",
    "model.dtype=float64",
]
PLUGIN = '''
import os, sys
from dataclasses import dataclass
from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource

@dataclass(kw_only=True)
class Vowels(RewardSource):
    """The share of vowels among a completion's characters."""
    name = "vowels"

    def __call__(self, rollouts):
        assert rollouts.prompts[0][-1]["role"] == "user"
        assert set(rollouts.columns) == {"topic"}
        return [sum(c in "aeiou" for c in text) / (len(text) or 1) for text in rollouts.completions]

    def close(self):
        print("wandb imported:", "wandb" in sys.modules)

@hookimpl
def rewards():
    return [Vowels]
'''


def begin(*words: str, cwd: Path, installed: bool = False, **environment: str) -> subprocess.Popen[str]:
    """Start `hf-rlhf train` with these words: warm, or as it is installed."""
    program = [str(Path(sys.executable).with_name("hf-rlhf"))] if installed else warm("hf_rlhf")
    env = {name: x for name, x in os.environ.items() if not name.startswith(("WANDB_", "HF_RLHF"))}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        [*program, "train", *words], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> str:
    """What it printed, after it ended well."""
    out, errors = process.communicate(timeout=scaled(300))
    assert process.returncode == 0, out + errors
    return out


def steps(folder: Path) -> list[int]:
    """The steps of metrics.jsonl, the entry at the end of training left out."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["step"] for entry in lines if "loss" in entry]


def load(folder: Path) -> tuple[Any, torch.Tensor]:
    """The policy as plain transformers loads it, and its parameters in one vector."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model, torch.cat([x.detach().double().flatten() for x in model.state_dict().values()])


@pytest.fixture(scope="module")
def place(tmp_path_factory, gsm8k):
    """A folder with 50 problems of GSM8K."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [(gsm8k / name).read_text() for name in ("train.jsonl", "test.jsonl")]
    (folder / "problems.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def trained(place, tiny_model_path):
    """(output folder, what was printed) of three steps of GRPO, each with a checkpoint."""
    words = ["grpo", "--model", str(tiny_model_path), "--dataset", "problems.jsonl", "--output-dir", "out", *SMALL]
    words += ["--max-steps", "3", "--seed", "7", "--learning_rate", "0.01", "training.warmup_steps=0"]
    words += ["--save_strategy", "steps", "training.save_steps=1", "rewards.1={use: length, target: 3, maximum: 9}"]
    printed = end(begin(*words, cwd=place, installed=True))
    return place / "out", printed


# What a run leaves


def test_the_policy_is_loadable_by_plain_transformers_and_has_learned(trained, tiny_model_path):
    from transformers import AutoTokenizer

    model, parameters = load(trained[0])
    _, before = load(tiny_model_path)
    assert (parameters - before).abs().max() > 1e-4
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    model.generate(**tokenizer("Question: 1 + 1?", return_tensors="pt"), max_new_tokens=3)


def test_the_summary_has_before_and_after_seconds_plan_and_versions(trained):
    summary = json.loads((trained[0] / "summary.json").read_text())
    names = {"accuracy", "reward/math_answer/mean", "reward/length/mean", "reward/total/mean"}
    assert names <= summary["before"].keys()
    assert names <= summary["after"].keys()
    assert summary["steps"] == 3
    assert summary["seconds"] > summary["train_seconds"] > 0
    assert {"advantages", "rewards", "policy_loss"} <= {plugin["axis"] for plugin in summary["plan"]["plugins"]}
    assert summary["versions"]["hf_rlhf"] == __version__
    assert summary["versions"]["torch_build"] == torch.__version__


def test_every_step_is_in_the_metrics_and_every_rollout_in_the_completions(trained):
    import pandas

    assert steps(trained[0]) == [1, 2, 3]
    frame = pandas.read_parquet(trained[0] / "completions")
    assert len(frame) == 3 * 8
    assert {"reward/math_answer", "reward/length", "reward/total", "advantage"} <= set(frame.columns)
    assert frame["prompt"].str.startswith("Question: ").all()


def test_the_resolved_recipe_is_a_recipe_of_the_same_algorithm(trained):
    text = (trained[0] / "recipe.yaml").read_text()
    again = load_recipe(str(trained[0] / "recipe.yaml"), [])
    assert again.algorithm().rewards[0].answer_after == "####"
    assert again.algorithm().rollout.prompts == 4
    assert again.training["max_steps"] == 3
    assert HEADER + again.dump() == text
    jsonschema.validate(read_yaml(text, "recipe.yaml"), recipe_schema())


def test_plain_output_says_what_runs_how_far_it_is_and_what_came_out(trained):
    printed = trained[1]
    assert "step 1/3  reward " in printed
    assert "step 3/3  reward " in printed
    for word in ("group's mean", "4 prompts x 2", "held-out prompts", "accuracy", "next:", "hf-rlhf check"):
        assert word in printed
    assert [line.split()[0] for line in printed.splitlines()[:5]] == ["model", "data", "algorithm", "batch", "memory"]


# Resume


def test_a_resumed_run_ends_with_the_parameters_of_the_uninterrupted_one_and_keeps_before(trained, place):
    folder = place / "resumed"
    shutil.copytree(trained[0], folder)
    for path in [folder / "checkpoint-2", folder / "checkpoint-3"]:
        shutil.rmtree(path)
    for path in [folder / "summary.json", folder / "model.safetensors"]:
        path.unlink()
    end(begin(str(folder / "recipe.yaml"), "--resume", "--output-dir", str(folder), cwd=place))
    torch.testing.assert_close(load(folder)[1], load(trained[0])[1], rtol=0, atol=0)
    found, whole = (json.loads((path / "summary.json").read_text()) for path in (folder, trained[0]))
    assert found["before"] == whole["before"]
    assert found["after"] == whole["after"]
    assert steps(folder) == [1, 2, 3]


# Spellings, datasets, plugins, processes


def test_trl_spellings_train_an_adapter(trained, place, tiny_model_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = ["--config", str(trained[0] / "recipe.yaml"), "--model_name_or_path", str(tiny_model_path)]
    words += [
        "--dataset_name",
        "problems.jsonl",
        "--num_generations",
        "4",
        "--max_completion_length=5",
        "--beta",
        "0.5",
    ]
    words += ["--learning_rate", "2e-3", "--use_peft", "--lora_r", "4", "--output_dir", "peft", "--max_steps", "1"]
    words += ["--num_iterations", "2", "--temperature", "0.7", "--save_strategy", "no"]
    end(begin(*words, cwd=place))
    recipe = load_recipe(str(place / "peft" / "recipe.yaml"), [])
    algorithm = recipe.algorithm()
    assert (algorithm.rollout.num_generations, algorithm.rollout.max_new_tokens) == (4, 5)
    assert (algorithm.rollout.temperature, algorithm.update.epochs, algorithm.kl[0].beta) == (0.7, 2, 0.5)
    assert (recipe.model.lora.r, recipe.training["learning_rate"]) == (4, 2e-3)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    assert PeftModel.from_pretrained(base, place / "peft").peft_config["default"].r == 4


def test_conversations_meet_a_reward_of_a_plugin_file_without_importing_wandb(tmp_path, tiny_model_path):
    rows = [
        {"messages": [{"role": "system", "content": "Sing."}, {"role": "user", "content": f"Song {i}"}], "topic": i}
        for i in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "vowels.py").write_text(PLUGIN)
    words = ["rlvr", "-p", "vowels.py", "--model", str(tiny_model_path), "--dataset", "chats.jsonl", "--max-steps", "1"]
    words += ["rewards=[{use: vowels}]", "dataset.prompt=messages", *SMALL[:3], "dataset.held_out=1"]
    printed = end(begin(*words, cwd=tmp_path))
    assert "wandb imported: False" in printed
    import pandas

    frame = pandas.read_parquet(tmp_path / "outputs" / "rlvr" / "completions")
    assert json.loads(frame["prompt"][0])[0] == {"role": "system", "content": "Sing."}
    summary = json.loads((tmp_path / "outputs" / "rlvr" / "summary.json").read_text())
    assert [p["name"] for p in summary["plan"]["plugins"] if p["axis"] == "rewards"] == ["vowels"]


def test_two_processes_train_one_policy(trained, place):
    words = [str(trained[0] / "recipe.yaml"), "--output-dir", "two", "--max-steps", "2"]
    started = [begin(*words, cwd=place, **rank) for rank in ranks()]
    first, second = (end(process) for process in started)
    assert "held-out prompts" in first
    assert "held-out prompts" not in second
    assert steps(place / "two") == [1, 2]
    arithmetic = json.loads((place / "two" / "summary.json").read_text())["plan"]["arithmetic"]
    assert ["processes", "2"] in [row[:2] for row in arithmetic]
    assert load(place / "two")[1].isfinite().all()


# Refusals


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str, loaded: bool = False
) -> str:
    """What `hf-rlhf train` prints as its one error, in this process; `loaded`: once the model is."""
    monkeypatch.setattr(sys, "argv", ["hf-rlhf", "train", *words])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    out, errors = capsys.readouterr()
    assert errors.startswith("error: ")
    assert errors.count("error: ") == 1
    assert "Traceback" not in out + errors
    assert loaded or out == "", "the plan comes after all that can be refused before the model loads"
    return errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["grop"], "no recipe named 'grop'"),
        (["grop"], "'grpo'"),
        (["grpo", "--learnign_rate", "1"], "no option --learnign_rate. Did you mean 'learning_rate'"),
        (["grpo", "advantges.use=gae"], "advantges"),
        (["grpo", "rewards.0.column=solution"], "rewards.math_answer reads solution: the dataset has answer"),
        (["grpo", 'dataset.prompt_template="{problem}"'], "there is no column 'problem'"),
        (["grpo", "advantages.use=gae"], "this combination is refused:"),
        (["grpo", "rollout.num_generations=1"], "compares the completions of a prompt"),
        (["grpo", "rollout.prompts=100"], "rollout.prompts=100 and the dataset has 45 rows"),
        (["grpo", "--gradient_accumulation_steps", "2"], "gradient_accumulation_steps=2 is refused"),
        (["grpo", "--resume"], "nothing to resume"),
        ([], "a recipe is missing"),
    ],
    ids=lambda x: " ".join(x[-2:]) if isinstance(x, list) else "",
)
def test_what_cannot_run_is_one_error_before_the_model_loads(words, says, monkeypatch, capsys, place, tmp_path):
    here, model = tmp_path / "here", tmp_path / "model"
    here.mkdir()
    model.mkdir()
    (model / "config.json").write_text("{}")  # it looks like a model, and is never loaded
    monkeypatch.chdir(here)
    data = ["--dataset", str(place / "problems.jsonl"), "dataset.prompt=question", "rollout.prompts=4"]
    if words:
        words = [words[0], "--model", str(model), *data, *words[1:]]
    assert says in refused(monkeypatch, capsys, *words)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["grpo", "dataset.prompt=question", "dataset.max_prompt_tokens=3", "rollout.max_new_tokens=8"],
            "3 are allowed",
        ),
        (
            ["sft", "dataset.columns={prompt: question, completion: answer}", "trainer.max_length=3"],
            "has no usable row",
        ),
    ],
    ids=["prompts", "rows"],
)
def test_lengths_are_refused_before_the_plan_is_printed_and_the_model_loads(
    words, says, monkeypatch, capsys, place, tmp_path, tiny_model_path
):
    shutil.copytree(tiny_model_path, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)
    named = ["--model", str(tmp_path / "model"), "--dataset", str(place / "problems.jsonl")]
    assert says in refused(
        monkeypatch, capsys, words[0], *named, *words[1:], *["rollout.prompts=4"][: words[0] == "grpo"]
    )


def test_an_output_folder_in_use_is_refused(trained, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = (trained[0] / "metrics.jsonl").read_bytes()
    said = refused(monkeypatch, capsys, "out/recipe.yaml", "--output-dir", "out")
    assert "out already contains a run. Pass --resume to continue it" in said
    assert (trained[0] / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_recipe_is_refused(trained, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    said = refused(
        monkeypatch, capsys, "out/recipe.yaml", "--output-dir", "out", "--resume", "advantages.eps=0.5", loaded=True
    )
    assert "comes from another run" in said
    assert "advantages.eps: 0.0001 in the checkpoint, 0.5 now" in said
