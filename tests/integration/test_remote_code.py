"""Models that bring code of their own: it runs, for the plan's memory too, where it is allowed, and not otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_rlhf.cli.runs.run import check, train
from tests.helpers import dpo_runs as dpo
from tests.helpers import offline_runs as off
from tests.helpers import runs

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
STUBBORN = """

    def __init__(self, config):
        super().__init__(config)
        self.size = float(self.lm_head.weight.detach().sum())
"""
STEPS = ("training.max_steps=1", "dataset.held_out=0")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Code of models is copied to a folder before it runs."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def own(folder: Path, more: str = "") -> Path:
    """The tiny policy as a model whose classes lie in its folder. Returns the folder."""
    off.save_model(folder)
    (folder / "own.py").write_text(CODE + more)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_rollouts(path: Path):
    return runs.recipe(
        rollout=runs.SAMPLED,
        model={"path": str(path)},
        training={"use_cpu": True, "max_steps": 1, "report_to": "none"},
    )


def test_the_plan_has_memory_where_the_code_may_run(tmp_path):
    path = own(tmp_path / "model")
    for made in (with_rollouts(path), dpo.recipe(tmp_path)):
        refused, allowed = (check(made, str(tmp_path / "out"), trust) for trust in (False, True))
        assert not refused.memory
        assert "custom code" in refused.memory_notes[0]
        assert allowed.memory["update"]["weights"] > 0
        assert not any("not estimated" in note for note in allowed.memory_notes)


def test_code_that_needs_weights_is_not_estimated(tmp_path):
    path = own(tmp_path / "model", STUBBORN)
    for made in (with_rollouts(path), dpo.recipe(tmp_path)):
        plan = check(made, str(tmp_path / "out"), True)
        assert not plan.memory
        assert plan.memory_notes[0].startswith("not estimated: the model cannot be built without weights")


def test_a_run_allows_it_to_its_plan(tmp_path):
    own(tmp_path / "model")
    summary = train(dpo.recipe(tmp_path, *STEPS), str(tmp_path / "out"), trust_remote_code=True, forecast=True)
    assert summary["plan"]["memory"]["update"]["weights"] > 0
