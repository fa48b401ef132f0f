"""`hf-rlhf plan`: layouts that fit, commands that train in them, seconds that runs confirm."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from hf_rlhf import load_recipe
from hf_rlhf.cli.app import app
from hf_rlhf.cli.main import add_commands
from hf_rlhf.cli.runs.run import train
from hf_rlhf.data.addition_task import addition_model
from hf_rlhf.metrics import aggregator
from hf_rlhf.report.run_data import read_runs
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training.planner.devices import DEVICES, fit
from hf_rlhf.training.planner.measured import seconds_of, work_of_run

SEVEN: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False}
SEVEN |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 5, "num_attention_heads": 64}
SEVEN |= {"num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768}


@pytest.fixture
def seven(tmp_path: Path) -> str:
    """The configuration of a model of 6.8 billion weights, in few layers."""
    (tmp_path / "seven").mkdir()
    (tmp_path / "seven" / "config.json").write_text(json.dumps(SEVEN))
    return str(tmp_path / "seven")


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    add_commands()
    app(["plan", *words, "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_model_that_one_device_cannot_hold_is_sharded_and_the_command_passes_the_check(seven, capsys):
    words = ["grpo", "--gpus", "8", "--model", seven, "--gradient_checkpointing", "true", "--bf16", "true"]
    found = planned(capsys, *words)
    layouts = {layout["title"]: layout for layout in found["layouts"]}
    assert not layouts["colocated"]["fits"]
    assert layouts["colocated"]["peak"] > 4 * 4 * 6.77 / 1.08  # weights, gradients, AdamW's state
    sharded = layouts["colocated, sharded"]
    assert sharded["fits"]
    assert sharded["memory"]["update"]["weights"] == pytest.approx(4 * 6.77e9 / 8 / 2**30, rel=0.01)
    assert layouts[found["best"]]["fits"]
    separate = layouts["4 train, 4 sample, sharded"]
    assert separate["engine"]["weights"] == pytest.approx(2 * 6.77e9 / separate["split"] / 2**30, rel=0.01)
    assert "nothing was measured" in found["notes"][0]
    for layout in (sharded, separate):
        typed = shlex.split(layout["command"])
        start = typed.index("train")
        devices = ["CUDA_VISIBLE_DEVICES=0,1,2,3"] if layout is separate else []
        assert typed[:start] == [*devices, "hf-rlhf"]
        rest = [word for i, word in enumerate(typed) if i > start and "--nproc" not in typed[i - 1 : i + 1]]
        app(["check", *rest], standalone_mode=False)
        assert re.search("rollout +" + ("vllm" if devices else "generate"), capsys.readouterr().out)


def test_an_offline_recipe_is_planned_too(seven, capsys):
    words = ["sft", "--gpus", "8", "--model", seven, "trainer.max_length=512", "--per_device_train_batch_size", "1"]
    found = planned(capsys, *words)
    assert found["best"] == "training, sharded"
    assert found["layouts"][0]["seconds"]["update"] == pytest.approx(found["layouts"][0]["timing"]["step"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstart", "--gpu", "h10"], "--gpu must be one of cpu, a100, h100, h200, b200, got 'h10'. Did you mean"),
        (
            ["quickstart", "--gpus", "1", "--gpu-memory", "0.1"],
            "on 1 x h100 of 0.1 GiB: colocated takes 0.2 GiB of each",
        ),
        (["quickstart", "--measured", "nowhere"], "RUN must be a folder with a run, got nowhere"),
        (["instructgpt"], "instructgpt has stages"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message, capsys):
    with pytest.raises(UserError) as refused:
        planned(capsys, *words)
    assert message in str(refused.value)


@pytest.mark.slow
def test_constants_of_two_sizes_predict_the_seconds_of_a_third(tmp_path, monkeypatch):
    """CPU seconds, so that other processes do not count; the median of nine steps."""
    monkeypatch.setattr(aggregator, "time", SimpleNamespace(**{**vars(time), "perf_counter": time.process_time}))
    tokenizer = AutoTokenizer.from_pretrained(addition_model())
    sizes = {"small": (64, 2), "middle": (96, 5), "large": (160, 4)}
    for name, (width, layers) in sizes.items():
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        config = Qwen2Config(vocab_size=len(tokenizer), **shape, num_attention_heads=4, num_key_value_heads=4)
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / f"model-{name}")
        tokenizer.save_pretrained(tmp_path / f"model-{name}")
        words = [f"model.path={tmp_path}/model-{name}", "training.max_steps=10", "training.eval_strategy=no"]
        words += [
            "rollout.max_new_tokens=16",
            "rollout.prompts=8",
            "dataset.max_prompt_tokens=8",
            "evaluation.prompts=2",
        ]
        train(load_recipe("quickstart", words), str(tmp_path / name))
    runs = [(work_of_run(run, "cpu"), seconds_of(run)) for run in read_runs([tmp_path / name for name in sizes])]
    for third in range(3):
        constants = fit(DEVICES["cpu"], [run for i, run in enumerate(runs) if i != third])
        work, seconds = runs[third]
        found = sum(constants.seconds(phase, works) for phase, works in work.items())
        assert found == pytest.approx(sum(seconds.values()), rel=0.3)
