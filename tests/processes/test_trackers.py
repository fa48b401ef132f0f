"""Trackers of `--report_to`, read back: a run of each, in the output folder, with the evaluations before and after training."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import warm
from tests.helpers.waits import scaled
from tests.helpers.wandb_runs import inspect

pytest.importorskip("mlflow")
pytest.importorskip("trackio")
pytest.importorskip("tensorboard")
pytest.importorskip("wandb")

VARIABLES = ("WANDB_", "TRACKIO_", "MLFLOW_", "TENSORBOARD_")
REPORT = "training.report_to=[tensorboard,trackio,mlflow,wandb]"
STEPS = ("training.max_steps=2", "training.logging_steps=1", "training.save_strategy=no")


def command(folder: Path, *words: str, **environment: str) -> None:
    """Run `hf-rlhf` in a folder without the trackers' own variables."""
    env = {name: x for name, x in os.environ.items() if not name.startswith(VARIABLES)}
    env |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", **environment}
    done = subprocess.run(
        [*warm("hf_rlhf"), *words], cwd=folder, env=env, capture_output=True, text=True, timeout=scaled(300)
    )
    assert done.returncode == 0, done.stdout + done.stderr


def tensorboard(folder: Path) -> Iterator[dict[int, set[str]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for run in {file.parent for file in folder.rglob("events.out.tfevents.*")}:
        found: dict[int, set[str]] = {}
        read = EventAccumulator(str(run))
        read.Reload()
        for tag in read.Tags()["scalars"]:
            for event in read.Scalars(tag):
                found.setdefault(event.step, set()).add(tag)
        yield found


def mlflow(folder: Path) -> Iterator[dict[int, set[str]]]:
    for file in folder.rglob("mlflow.db"):
        with sqlite3.connect(file) as base:
            for run, status in base.execute("select run_uuid, status from runs").fetchall():
                assert status == "FINISHED"
                found: dict[int, set[str]] = {}
                for name, step in base.execute("select key, step from metrics where run_uuid = ?", (run,)):
                    found.setdefault(step, set()).add(f"{'eval/' if name.startswith('eval_') else 'train/'}{name[5:]}")
                yield {step: {x if x[:5] == "eval/" else "train/loss" for x in names} for step, names in found.items()}


def trackio(folder: Path) -> Iterator[dict[int, set[str]]]:
    for file in folder.rglob("trackio/*.db"):
        with sqlite3.connect(file) as base:
            rows = base.execute("select run_id, metrics from metrics").fetchall()
        for run in {run for run, _ in rows}:
            yield by_step(json.loads(entry) for each, entry in rows if each == run)


def wandb(folder: Path) -> Iterator[dict[int, set[str]]]:
    for run in folder.rglob("wandb/offline-run-*"):
        if run.is_dir():
            yield by_step(record["history"]["item"] for record in inspect(run) if record["type"] == "history")


def by_step(entries) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for entry in entries:
        found.setdefault(entry["train/global_step"], set()).update(entry)
    return found


READERS = (tensorboard, mlflow, trackio, wandb)


def check(folder: Path, evaluated: str, readers=READERS) -> None:
    """One run of each tracker, with held-out metrics at steps 0 and 2 and those of training at 1 and 2."""
    for reader in readers:
        runs = list(reader(folder))
        assert len(runs) == 1, (reader.__name__, runs)
        (run,) = runs
        assert sorted(run) == [0, 1, 2], reader.__name__
        assert evaluated in run[0] & run[2], reader.__name__
        assert evaluated not in run[1], reader.__name__
        assert "train/loss" in run[1] & run[2], reader.__name__


def test_a_run_with_rollouts_is_one_run_in_the_output_folder(tmp_path):
    command(tmp_path, "train", "quickstart", "--output-dir", "out", REPORT, *STEPS, "dataset.held_out=8")
    check(tmp_path / "out", "eval/accuracy")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("recipe", ["sft", pytest.param("rm", marks=pytest.mark.slow)])
def test_a_run_without_rollouts_is_one_run_in_the_output_folder(tmp_path, recipe):
    command(tmp_path, "train", recipe, "--output-dir", "out", REPORT, *STEPS)
    check(tmp_path / "out", "eval/loss")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stage_of_a_pipeline_is_one_run_of_each_tracker(tmp_path):
    words = [f"{stage}.{word}" for stage in ("sft", "dpo") for word in (REPORT, *STEPS)]
    command(tmp_path, "pipeline", "dpo_pipeline", "--output-dir", "out", *words)
    for stage in ("sft", "dpo"):
        check(tmp_path / "out" / stage, "eval/loss", [tensorboard, mlflow, wandb])
    runs = list(trackio(tmp_path / "out"))
    assert len(runs) == 2
    assert all("eval/loss" in run[0] & run[2] and "train/loss" in run[1] for run in runs)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_variables_of_the_trackers_win(tmp_path):
    places = {"WANDB_DIR": "w", "TRACKIO_DIR": "t", "MLFLOW_TRACKING_URI": "m", "TENSORBOARD_LOGGING_DIR": "b"}
    places = {name: str(tmp_path / x / ("trackio" if x == "t" else "")) for name, x in places.items()}
    places["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/m/mlflow.db"
    for name in "wm":
        (tmp_path / name).mkdir()
    command(tmp_path, "train", "quickstart", "--output-dir", "out", REPORT, *STEPS, "dataset.held_out=8", **places)
    for reader, name in zip(READERS, "bmtw", strict=True):
        check(tmp_path / name, "eval/accuracy", [reader])
        assert not list(reader(tmp_path / "out"))
