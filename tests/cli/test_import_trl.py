"""`hf-rlhf import-trl`: what it prints is a recipe that `check` accepts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf.cli import main

CONFIGS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "dr_grpo", "scale_rewards": False, "use_vllm": True, "max_completion_length": 8},
    "rloo": {
        "normalize_advantages": True,
        "mask_truncated_completions": True,
        "num_iterations": 2,
        "max_completion_length": 8,
    },
    "dpo": {"loss_type": ["apo_zero"], "gradient_accumulation_steps": 4, "use_peft": True},
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    def run(*words: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-rlhf", *words])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        found = capfd.readouterr()
        assert (stopped.value.code or 0) == code, found.err
        return found.out, found.err

    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "solution": str(i + 1), "answer": str(i + 1)} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.mark.parametrize("trainer", CONFIGS)
def test_check_accepts_what_is_printed(run, trainer):
    Path("config.json").write_text(json.dumps({**CONFIGS[trainer], "max_steps": 3, "output_dir": "out"}))
    out, said = run("import-trl", "config.json")
    assert "output_dir: pass --output-dir" in said
    assert all(f"#   {line.strip()}" in out for line in said.splitlines()[1:])
    Path("mine.yaml").write_text(out)
    rows = ["--dataset", "builtin:addition" if trainer == "dpo" else "rows.jsonl"]
    assert "optimizer steps" in run("check", "mine.yaml", *rows, "--model", "builtin:addition")[0]
    found = json.loads(run("import-trl", "config.json", "--json")[0])
    assert found["trainer"] == trainer
    assert "output_dir" in found["without_counterpart"]


def test_a_recipe_is_written_to_a_new_file_alone(run):
    Path("config.yaml").write_text("scale_rewards: batch\nper_device_train_batch_size: 4\n")
    assert run("import-trl", "config.yaml", "--processes", "4", "--output", "new/mine.yaml")[0] == ""
    assert "prompts: 2," in Path("new/mine.yaml").read_text()
    assert "exists" in run("import-trl", "config.yaml", "--output", "new/mine.yaml", code=2)[1]
    assert "there is no file nix.yaml" in run("import-trl", "nix.yaml", code=2)[1]
    assert "must divide the 4 rows" in run("import-trl", "config.yaml", code=2)[1]


def test_what_check_would_refuse_is_listed_too(run):
    Path("config.yaml").write_text("loss_type: cispo\nreward_funcs: [accuracy_reward]\n")
    out, said = run("import-trl", "config.yaml")
    assert "check refuses it: policy_loss: epsilon_high must be at least 1" in said
    Path("mine.yaml").write_text(out)
    assert "epsilon_high must be at least 1" in run("check", "mine.yaml", code=2)[1]
