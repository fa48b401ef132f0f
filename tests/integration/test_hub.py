"""Runs on the Hub: the model card of a run, its push to a stand-in of the Hub, and pushes that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import ModelCard, constants

from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.metrics.model_card import Card
from hf_rlhf.runtime import hub_push
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.hub_push import PushError
from tests.helpers import runs, stage_runs
from tests.helpers.hub import TOKEN, serving_hub
from tests.helpers.paths import environment
from tests.helpers.waits import scaled

DATA = {"data": runs.problems(20), "eval_data": runs.problems(4, seed=1)}
PUSH = {"push_to_hub": True}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hub for this process, which has a token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    with serving_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


# The model card


def test_the_card_of_a_run_says_what_was_done_and_how_well(tmp_path):
    made = runs.trainer(tmp_path / "tiny", **DATA, evaluation={"num_generations": 2}, rewards=[{"use": "exact_match"}])
    made.evaluate()
    made.train()
    made.evaluate()
    made.save_model()
    card, text = card_of(tmp_path / "tiny"), (tmp_path / "tiny" / "README.md").read_text()
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"hf_rlhf", "reinforcement-learning"} <= set(card.data.tags)
    after = json.loads((tmp_path / "tiny" / "summary.json").read_text())["after"]
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found["accuracy"].metric_value == round(after["accuracy"], 6)
    assert found.keys() == {"accuracy", "pass@2", "maj@2", "reward/total/mean"}
    assert "to" in found["accuracy"].metric_name
    for heading in ("Evaluation", "Curves", "How it was trained", "Repeat it", "Versions"):
        assert f"\n## {heading}\n" in text
    assert "\n| accuracy | " in text
    assert made.plan.in_words["algorithm"] in text
    assert "| advantages | `group_norm` | hf_rlhf " in text
    recipe = text.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(recipe) == yaml.safe_load((tmp_path / "tiny" / "recipe.yaml").read_text())


def test_a_card_names_base_model_and_dataset_where_they_are_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    summary = {"recipe": "grpo", "model": "Qwen/Qwen3-0.6B", "dataset": "openai/gsm8k", "after": {"accuracy": 0.5}}
    card = ModelCard(str(Card(name="x", summary=summary, recipe=None, history=[], options={"license": "mit"})))
    assert (card.data.base_model, card.data.datasets, card.data.license) == ("Qwen/Qwen3-0.6B", ["openai/gsm8k"], "mit")
    assert card.data.eval_results[0].dataset_type == "openai/gsm8k"
    assert "[Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B)" in card.text
    local = {**summary, "model": "here/model", "dataset": "rows.jsonl"}
    card = ModelCard(str(Card(name="x", summary=local, recipe=None, history=[])))
    assert (card.data.base_model, card.data.datasets) == (None, None)


def test_trainer_s_own_arguments_reach_the_card(tmp_path):
    made = runs.trained(tmp_path, **DATA)
    made.create_model_card(
        language="en", license="apache-2.0", tags="mine", model_name="y", finetuned_from="a/b", dataset_tags="c/d"
    )
    data = card_of(tmp_path).data
    assert (data.language, data.license, data.base_model, data.datasets) == ("en", "apache-2.0", "a/b", "c/d")
    assert {"mine", "hf_rlhf"} <= set(data.tags)
    assert "\n# y\n" in (tmp_path / "README.md").read_text()


def test_an_adapter_has_the_library_and_the_card_of_the_run(tmp_path):
    made = runs.trained(tmp_path, **DATA, lora=True)
    made.save_model()
    assert card_of(tmp_path).data.library_name == "peft"
    assert "lora" in card_of(tmp_path).data.tags
    assert "## Curves" in (tmp_path / "README.md").read_text()


# Pushes


def test_a_command_pushes_a_run_whole(tmp_path):
    """In a process of its own, as a user would: HF_ENDPOINT and HF_TOKEN alone say where to."""
    with serving_hub() as hub:
        env = environment(HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="0")
        words = [
            "train",
            "quickstart",
            "--max-steps",
            "2",
            "evaluation.prompts=4",
            "--output-dir",
            "out",
            "--push_to_hub",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "hf_rlhf", *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=scaled(180),
        )
        assert done.returncode == 0, done.stderr
        assert f"pushed to {hub.url}/someone/out" in done.stdout
        files = hub.files["someone/out"]
        for name in (
            "README.md",
            "model.safetensors",
            "tokenizer.json",
            "recipe.yaml",
            "summary.json",
            "metrics.jsonl",
        ):
            assert files[name] == (tmp_path / "out" / name).read_bytes()
        assert not [path for path in files if "lock" in path or path.startswith(("_", "."))]
        assert hub.messages == ["Model save"]


@pytest.mark.parametrize("recipe", ["quickstart", "dpo"])
def test_a_run_is_pushed_once_with_summary_and_card(hub, tmp_path, recipe):
    changes = ["training.max_steps=2", "training.push_to_hub=true", "training.hub_model_id=org/name"]
    summary = train(load_recipe(recipe, changes), str(tmp_path / "out"))
    files = hub.files["org/name"]
    assert json.loads(files["summary.json"])["steps"] == summary["steps"] == 2
    assert f"- {recipe}\n" in files["README.md"].decode()
    assert hub.messages == ["Model save"]
    assert hub.asked.count("/api/repos/create") <= 2, "before the model loads, and by the trainer"


def test_checkpoints_are_pushed_as_hub_strategy_says(hub, tmp_path):
    options = {**PUSH, "save_strategy": "steps", "save_steps": 1, "hub_strategy": "checkpoint", "max_steps": 2}
    made = runs.trainer(tmp_path / "out", **DATA, training=options)
    made.train()
    made.save_model()
    assert hub.messages[-1] == "Model save"
    assert any(message.startswith("Training in progress, step") for message in hub.messages)
    assert any(path.startswith("last-checkpoint/") for path in hub.files["someone/out"])


def test_python_pushes_with_metadata_and_an_own_message(hub, tmp_path):
    made = runs.trained(tmp_path / "out", **DATA)
    made.push_to_hub("By hand", tags=["mine"], license="mit")
    assert hub.messages == ["By hand"]
    assert made.pushed_to == f"{hub.url}/someone/out"
    card = hub.files["someone/out"]["README.md"].decode()
    assert "- mine\n" in card
    assert "license: mit" in card


# Pushes that fail


@pytest.mark.parametrize(
    ("token", "refuses", "said"),
    [
        ("", {}, "needs a token"),
        ("hf_wrong", {}, "needs a token"),
        (TOKEN, {"/api/repos/create": 403}, "may not write out"),
        (TOKEN, {"/api/repos/create": 400}, "refused out"),
    ],
)
def test_who_may_not_push_is_told_before_a_model_is_loaded(hub, tmp_path, monkeypatch, token, refuses, said):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("hf_rlhf.training.setup.load_model", lambda *args: pytest.fail("a model was loaded"))
    hub.refuses = refuses
    with pytest.raises(UserError, match=said):
        train(load_recipe("quickstart", ["training.push_to_hub=true", "training.max_steps=1"]), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"refuses": {"/commit/": 403}}, "may not write someone/out"),
        ({"refuses": {"/preupload/": 400}}, "refused someone/out"),
        ({"silent": "/preupload/"}, "did not answer in time"),
        ({"silent": "/api/repos"}, "did not answer in time"),
    ],
    ids=["forbidden", "refused", "silent upload", "silent"],
)
def test_a_push_that_fails_costs_nothing_of_the_run(hub, tmp_path, monkeypatch, capsys, behaviour, said):
    monkeypatch.setattr(hub_push, "SECONDS", 0.5)
    monkeypatch.setattr(hub_push, "ANSWER_S", 0.5)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    for name, value in behaviour.items():
        setattr(hub, name, value)
    begun = time.monotonic()
    with pytest.raises(PushError, match=said) as failed:
        train(load_recipe("quickstart", ["training.push_to_hub=true", "training.max_steps=1"]), str(tmp_path / "out"))
    assert time.monotonic() - begun < scaled(60)
    assert "hf upload" in str(failed.value)
    assert failed.value.code == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["after"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "1 steps in" in capsys.readouterr().out, "the result is printed all the same"


def test_a_hub_that_comes_back_gets_the_run(hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hub_push, "SECONDS", 0.3)
    hub.silent = "/api/repos"
    made = runs.trainer(tmp_path / "out", **DATA, training=PUSH)
    assert "is asked again at its end" in caplog.text
    made.train()
    hub.silent = None
    made.save_model()
    assert "README.md" in hub.files["someone/out"]


def test_a_stage_that_is_not_pushed_is_followed_by_the_next(hub, tmp_path, caplog):
    hub.refuses = {"/commit/": 403}
    summary = stage_runs.run(tmp_path, "sft.training.push_to_hub=true", resume=False)
    assert list(summary["stages"]) == ["sft", "rm", "ppo"]
    assert "sft: the token may not write someone/sft" in caplog.text
