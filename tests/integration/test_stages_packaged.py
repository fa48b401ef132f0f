"""Every packaged pipeline that is not instructgpt, trained to its end over a tiny model: a few steps of each stage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hf_rlhf.cli.runs.pipeline_run import run_stages
from hf_rlhf.config.pipeline import load_pipeline
from tests.helpers import offline_runs as off
from tests.helpers import sft_runs as sft


def run(name: str, folder: Path, *words: str) -> dict[str, Any]:
    """The summary of two steps of each stage, with learning rates at which so small a model moves."""
    off.save_model(folder / "model")
    files = {
        "sft": off.write(folder / "rows.jsonl", sft.rows(40)),
        "rm": off.write(folder / "pairs.jsonl", off.rows("reward_model")),
        "ppo": off.write(folder / "prompts.jsonl", [{"prompt": f"{i}+", "answer": str(i)} for i in range(40)]),
    }
    files |= {"dpo": files["rm"], "rl": files["ppo"]}
    given = [f"sft.model.path={folder / 'model'}", *words]
    for stage in load_pipeline(name).stages:
        set_to = {"use_cpu": "true", "max_steps": 2, "learning_rate": 0.01, "warmup_steps": 0}
        given += [f"{stage.name}.training.{key}={value}" for key, value in set_to.items()]
        given += [f"{stage.name}.dataset.path={files[stage.name]}", f"{stage.name}.dataset.held_out=4"]
    return run_stages(load_pipeline(name, given), folder / "out")


def finished(folder: Path, summary: dict[str, Any], *stages: str) -> None:
    """Each stage took its steps, moved its model and left it where the next one found it."""
    assert list(summary["stages"]) == list(stages)
    assert [stage["steps"] for stage in summary["stages"].values()] == [2] * len(stages)
    for earlier, name in itertools.pairwise(stages):
        if earlier != "rm" and name != "rm":
            before, after = off.weights(folder / "out" / earlier), off.weights(folder / "out" / name)
            assert before.keys() == after.keys()
            assert not off.same(before, after)


def test_deepspeed_chat_trains_three_models_and_keeps_an_average(tmp_path):
    small = ("ppo.rollout.prompts=8", "ppo.rollout.max_new_tokens=4", "ppo.training.per_device_train_batch_size=8")
    summary = run("deepspeed_chat", tmp_path, f"rm.model.path={tmp_path / 'model'}", *small)
    finished(tmp_path, summary, "sft", "rm", "ppo")
    assert {"pairs/accuracy", "pairs/accuracy_low"} <= summary["stages"]["rm"]["after"].keys()
    assert {"kl/rollout/sequence", "value/explained_var"} <= summary["stages"]["ppo"]["last"].keys()
    out = tmp_path / "out"
    first, average, last = (off.weights(folder) for folder in (out / "sft", out / "ppo" / "ema", out / "ppo"))
    name = max(first, key=lambda key: float((last[key] - first[key]).abs().max()))
    moved, followed = (float((x[name].double() - first[name].double()).abs().max()) for x in (last, average))
    assert 0 < followed < 0.1 * moved  # 0.992 of it stays at every step
    said = (out / "recipe.yaml").read_text()
    assert "stage:sft" in said


def test_r1_goes_from_a_cold_start_to_rules(tmp_path):
    small = (
        "rl.rollout.prompts=8",
        "rl.rollout.num_generations=2",
        "rl.rollout.max_new_tokens=6",
        "rl.update.mini_batches=2",
    )
    batches = ("sft.training.per_device_train_batch_size=4", "sft.training.gradient_accumulation_steps=2")
    shorter = "{use: length, unit: characters, target: 1, maximum: 9}"  # so that samples that are all wrong differ
    rules = f"rl.rewards=[{{use: math_answer, column: answer}}, {{use: format}}, {shorter}]"
    summary = run("r1", tmp_path, *small, *batches, rules)
    finished(tmp_path, summary, "sft", "rl")
    after = summary["stages"]["rl"]["after"]
    assert {"reward/math_answer/mean", "reward/format/mean", "accuracy"} <= after.keys()
    assert "kl/ref" in summary["stages"]["rl"]["last"]


def test_dpo_pipeline_starts_dpo_from_the_fine_tuned_model(tmp_path):
    summary = run("dpo_pipeline", tmp_path)
    finished(tmp_path, summary, "sft", "dpo")
    before, after = (summary["stages"]["dpo"][when] for when in ("before", "after"))
    assert before["pairs/margin"] == 0  # the reference is the model that it starts from
    assert after["pairs/margin"] != 0
