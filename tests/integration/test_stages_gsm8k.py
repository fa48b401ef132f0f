"""examples/gsm8k_pipeline.py on a few problems of GSM8K: its rows, its model, and the three stages to their end."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf.cli.runs.pipeline_run import run_stages
from hf_rlhf.config.pipeline import load_pipeline
from tests.helpers.paths import DATA, ROOT

SOURCE = DATA / "gsm8k"


@pytest.fixture(scope="module")
def example() -> Any:
    """The script as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module("gsm8k_pipeline")
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def prepared(example, tmp_path_factory) -> Path:
    """What the script prepares of the problems."""
    folder = tmp_path_factory.mktemp("prepared")
    assert example.prepare(SOURCE, folder).keys() == {f"{kind}_{side}.jsonl" for kind, side in KINDS}
    return folder


KINDS = [(kind, side) for side in ("train", "test") for kind in ("sft", "pairs", "ppo")]


def test_no_test_problem_is_trained_on(example, prepared):
    rows = {(kind, side): example.read(prepared / f"{kind}_{side}.jsonl") for kind, side in KINDS}
    prompts = {place: {row["prompt"] for row in found} for place, found in rows.items()}
    trained, held_out = (
        set().union(*(prompts[kind, side] for kind in ("sft", "pairs", "ppo"))) for side in ("train", "test")
    )
    assert all(rows.values())
    assert not trained & held_out
    assert len(prompts["pairs", "test"]) == len(rows["pairs", "test"])
    assert all(row["completion"].rpartition("A: ")[2] for row in rows["sft", "train"])
    assert not any("####" in json.dumps(found) for found in rows.values())
    assert all(row["answer"] and "\n" not in row["answer"] for row in rows["ppo", "train"] + rows["ppo", "test"])


@pytest.mark.slow
def test_its_stages_run_to_their_end(example, prepared):
    example.save_model(prepared / "sft_train.jsonl", prepared / "model")
    words = [*example.overrides(prepared, (2, 2, 4)), "ppo.rollout.prompts=8", "ppo.rollout.max_new_tokens=12"]
    words += [f"{stage}.training.use_cpu=true" for stage in ("sft", "rm", "ppo")]
    summary = run_stages(load_pipeline("instructgpt", words), prepared / "run")["stages"]
    assert [stage["steps"] for stage in summary.values()] == [2, 2, 4]
    assert summary["sft"]["after"]["tokens/perplexity"] < summary["sft"]["before"]["tokens/perplexity"]
    assert summary["rm"]["after"]["pairs/count"] == summary["rm"]["rows"]["evaluation"]
    assert {"reward/reward_model/mean", "reward/numeric/mean", "accuracy"} <= summary["ppo"]["after"].keys()
    assert {"kl/rollout/sequence", "value/explained_var"} <= summary["ppo"]["last"].keys()
