"""`hf-rlhf pipeline` in processes of its own: killed and started again, printed, and its runs in W&B."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import offline_runs as off
from tests.helpers import stage_runs as st
from tests.helpers.processes import ended_well, ranks
from tests.helpers.waits import scaled
from tests.helpers.wandb_runs import inspect

NAMES = ("sft", "rm", "ppo")


def summaries(folder: Path) -> dict[str, bytes]:
    """Of the stages that are finished."""
    files = {name: folder / name / "summary.json" for name in NAMES}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def test_a_run_that_is_killed_in_every_stage_goes_on_to_the_same_bits(tmp_path):
    """By SIGKILL: between two checkpoints, before the first one, and in the middle of a rollout's optimizer steps."""
    given, out = st.stages(tmp_path), tmp_path / "killed"
    for name, (steps, every) in {"sft": (5, 2), "rm": (5, 2), "ppo": (10, 3)}.items():
        given[name]["set"] |= {"training.max_steps": steps, "training.save_steps": every}
        given[name]["set"] |= {"training.save_strategy": "steps", "training.save_total_limit": 1}
    st.write(tmp_path, given)
    run = ("pipeline", "tiny.yaml", "--output-dir", "killed")
    st.killed(tmp_path, 4, "post", *run)
    assert checkpoints(out) == {"sft": [2]}
    st.killed(tmp_path, 3 + 1, "pre", *run)
    assert checkpoints(out) == {"sft": [5], "rm": []}
    st.killed(tmp_path, 5 + 8, "post", *run)  # two rollouts of four steps, then another one
    assert checkpoints(out) == {"sft": [5], "rm": [5], "ppo": [6]}
    first = summaries(out)
    assert list(first) == ["sft", "rm"]
    assert not (out / "summary.json").exists()
    resumed = st.run(tmp_path, out="killed", given=given)
    assert first.items() <= summaries(out).items()
    assert [stage["steps"] for stage in resumed["stages"].values()] == [5, 5, 10]
    assert [entry["step"] for entry in off.lines(out / "ppo") if "loss" in entry] == list(range(1, 11))
    st.run(tmp_path, out="straight", given=given)
    for name in ("sft", "rm", "ppo", "ppo/critic"):
        assert off.same(off.weights(out / name), off.weights(tmp_path / "straight" / name)), name


def checkpoints(folder: Path) -> dict[str, list[int]]:
    """Stage -> the steps of its whole checkpoints."""
    return {
        name: sorted(int(file.parent.name[11:]) for file in (folder / name).glob("checkpoint-*/rlhf_manifest.json"))
        for name in NAMES
        if (folder / name).is_dir()
    }


def test_the_command_prints_every_stage_and_its_metrics(tmp_path):
    given = {name: stage for name, stage in st.stages(tmp_path).items() if name != "ppo"}
    st.write(tmp_path, given)
    process = st.command(tmp_path, "pipeline", "tiny.yaml", "--output-dir", "out", "rm.recipe=rm")
    printed, _ = process.communicate(timeout=scaled(150))
    assert process.returncode == 0, printed
    for line in ("stage 1 of 2: sft, recipe sft\n", "stage 2 of 2: rm, recipe rm\n"):
        assert line in printed
    table = printed[printed.rindex("\nstages") :]
    for name in ("tokens/perplexity", "tokens/accuracy", "pairs/accuracy"):
        assert name in table


def test_runs_of_wandb_share_a_group(tmp_path):
    """Each stage is a run of its own in W&B, offline here."""
    pytest.importorskip("wandb")
    given = {name: stage for name, stage in st.stages(tmp_path).items() if name != "ppo"}
    for stage in given.values():
        stage["set"]["training.report_to"] = "wandb"
    st.write(tmp_path, given)
    process = st.command(
        tmp_path,
        *("pipeline", "tiny.yaml", "--output-dir", "one-group"),
        WANDB_MODE="offline",
        WANDB_DIR=str(tmp_path),
        WANDB_SILENT="true",
    )
    printed, _ = process.communicate(timeout=scaled(150))
    assert process.returncode == 0, printed
    found = [group_and_name(file) for file in (tmp_path / "wandb").glob("offline-run-*")]
    assert sorted(found) == [("one-group", "tiny/rm"), ("one-group", "tiny/sft")]


def group_and_name(run: Path) -> tuple[str, str]:
    """What W&B wrote down of a run, by its own reader."""
    records = inspect(run)
    found = next(record["run"] for record in records if record["type"] == "run")
    return found["run_group"], found["display_name"]


@pytest.mark.slow
def test_two_processes_skip_and_train_together(tmp_path):
    """One stage is there, the second one is trained by both; they write one summary."""
    given = {name: stage for name, stage in st.stages(tmp_path).items() if name != "ppo"}
    st.run(tmp_path, given=given)
    shutil.rmtree(tmp_path / "out" / "rm")
    kept = summaries(tmp_path / "out")
    ended_well([st.command(tmp_path, "pipeline", "tiny.yaml", "--output-dir", "out", **rank) for rank in ranks()])
    assert kept.items() <= summaries(tmp_path / "out").items()
    stages = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert [stage["steps"] for stage in stages.values()] == [4, 4]
    manifest = json.loads((tmp_path / "out" / "rm" / "checkpoint-4" / "rlhf_manifest.json").read_text())
    assert manifest["processes"] == 2
