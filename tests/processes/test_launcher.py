"""`accelerate launch` that starts fewer processes than it was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_rlhf.config.launcher import asked_for
from tests.helpers.paths import ROOT, environment


def test_the_plan_says_that_one_process_was_started_where_two_were_asked_for(tmp_path):
    words = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "hf_rlhf",
        "check",
        "quickstart",
    ]
    made = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, check=True)
    assert "accelerate launch was asked for 2 processes and started this one alone" in " ".join(made.stdout.split())
    assert "Use the flag --nproc 2 instead" in " ".join(made.stdout.split())


@pytest.mark.parametrize(
    ("words", "due"),
    [
        (["accelerate", "launch", "--num_processes", "3", "train.py"], 3),
        (["accelerate", "launch", "--num-processes=4", "train.py"], 4),
        (["accelerate", "launch", "--config_file", "FILE", "train.py"], 5),
        (["accelerate", "launch", "--config_file", "FILE", "--num_processes", "1", "train.py"], 1),
        (["bash", "--num_processes", "2"], 1),
    ],
    ids=str,
)
def test_the_command_line_comes_before_the_configuration(words, due, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.commands.config.default_config_file", str(tmp_path / "none.yaml"))
    file = tmp_path / "accelerate.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 5\nuse_cpu: true\n")
    assert asked_for([str(file) if word == "FILE" else word for word in words]) == due


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_configurations_of_accelerate_start_processes_that_train_together(name, tmp_path):
    file = ROOT / "examples" / "accelerate" / f"{name}.yaml"
    words = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(file),
        "--num_processes",
        "2",
        "-m",
        "hf_rlhf",
        "train",
    ]
    code = [*words, "quickstart", "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    made = subprocess.run([sys.executable, *code], env=environment(), capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    assert "over 2 processes" in made.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()
