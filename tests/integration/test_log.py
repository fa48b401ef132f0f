"""What a run leaves besides the policy: metrics.jsonl, completions/*.parquet and what the trackers of `report_to` get."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from hf_rlhf import RLHFTrainer
from hf_rlhf.axes import PolicyLoss
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.metrics.jsonl_log import RunLog, completion_rows
from hf_rlhf.metrics.trackers import guard
from hf_rlhf.runtime.checkpoint_state import load_state, save_state
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs

TIMED = ("time/", "memory/", "perf/", "train_", "eval_runtime", "eval_samples", "eval_steps")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: x for name, x in entry.items() if not name.startswith(TIMED)} for entry in entries]


# metrics.jsonl


def test_every_log_entry_is_a_line_with_its_step_and_its_finite_numbers(tmp_path):
    made = runs.trained(tmp_path)
    found = lines(tmp_path)
    assert [entry["step"] for entry in found] == [1, 2, 2]
    for entry, logged in zip(found, made.state.log_history, strict=True):
        assert entry == logged
        assert all(math.isfinite(x) for x in entry.values())
    assert {"reward/early/mean", "reward/total/mean", "policy/loss", "advantage/mean"} <= found[0].keys()


def test_the_files_can_be_read_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_rlhf.metrics.jsonl_log.TABLES_EVERY_S", 0.0)
    seen = []

    class Read(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                seen.append((lines(tmp_path)[-1]["step"], len(list(tmp_path.glob("completions/*.parquet")))))

    runs.trained(tmp_path, callbacks=[Read()], training={"max_steps": 4}, update={})
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_a_resumed_run_has_each_step_once_with_the_same_numbers(tmp_path):
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    runs.trained(tmp_path, training=training, update={})
    whole = untimed(lines(tmp_path))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss')  # the process died here
    made = runs.trainer(tmp_path, training=training, update={})
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    made.close()
    assert untimed(lines(tmp_path)) == whole
    assert [path.stem for path in sorted(tmp_path.glob("completions/*"))] == [f"step_00000{i}" for i in (1, 2, 3, 4)]


def test_entries_of_several_steps_are_the_same_after_a_resume_in_their_middle(tmp_path):
    training = {"max_steps": 10, "logging_steps": 5, "save_strategy": "steps", "save_steps": 3}
    runs.trained(tmp_path, training=training)
    whole = lines(tmp_path)
    assert [entry["step"] for entry in whole if "loss" in entry] == [5, 10]
    for step in (3, 6):
        made = runs.trainer(tmp_path, training=training)
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        made.close()
        assert untimed(lines(tmp_path)) == untimed(whole)


def test_a_loss_that_is_not_finite_is_one_entry(tmp_path):
    made = runs.trainer(tmp_path, training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2}, update={})
    step = made.training_step
    made.training_step = lambda *args: step(*args) * (math.nan if made.state.global_step == 1 else 1.0)
    made.train()
    losses = [entry["loss"] for entry in runs.entries(made)]
    assert [math.isfinite(x) for x in losses] == [True, False, True, True]
    again = runs.trainer(tmp_path, training={"max_steps": 4}, update={})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["loss"] for entry in runs.entries(again)][2:] == losses[2:]


def test_a_new_run_in_the_folder_of_an_old_one_starts_the_files_anew_and_keeps_its_evaluation(tmp_path):
    runs.trained(tmp_path, training={"max_steps": 4}, update={})
    made = runs.trainer(tmp_path, eval_data=runs.problems(2, seed=1), training={"max_steps": 1}, update={})
    made.evaluate()
    made.train(overwrite=True)
    made.close()
    found = lines(tmp_path)
    assert [entry["step"] for entry in found] == [0, 1, 1]
    assert "eval_reward/total/mean" in found[0]
    assert [path.stem for path in tmp_path.glob("completions/*")] == ["step_000001"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a file on a disk that is full")
def test_a_full_disk_is_one_warning_and_training_goes_on(tmp_path, caplog):
    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                (tmp_path / "metrics.jsonl").unlink()
                (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    with caplog.at_level(logging.WARNING):
        made = runs.trained(tmp_path, callbacks=[Fill()], training={"max_steps": 4})
    assert made.state.global_step == 4
    assert [r.message for r in caplog.records if "RunLog" in r.message] == [
        "RunLog failed; training continues without it. OSError: [Errno 28] No space left on device"
    ]


def test_a_disk_that_fills_up_within_a_line_leaves_no_half_of_it(tmp_path):
    resource = pytest.importorskip("resource")
    log = guard(RunLog(tmp_path, {}), patience=None)

    def write_step(step: int) -> None:
        state = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=9)
        log.on_log(None, state, None, logs={"policy/loss": 0.5, "reward/total/mean": 0.25})

    write_step(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, limits[1]))
    try:
        write_step(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write_step(3)
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 3]


def test_completions_that_cannot_be_written_cost_no_line_of_metrics(tmp_path, caplog):
    (tmp_path / "completions").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        runs.trained(tmp_path, training={"max_steps": 4})
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3, 4, 4]
    assert sum("RunLog failed" in r.message for r in caplog.records) == 1


# Completions


ODD = ["plain", "emoji 🦙", "half a pair \ud83e", "nul \x00 and \x1b[31m", "", 'quote " comma , \n line']


def write(folder: Path, **texts: list[Any]) -> Path:
    """The parquet file of one log entry, through RunLog."""
    n = len(next(iter(texts.values())))
    log = RunLog(folder, {})
    scores = torch.tensor([float("nan"), *range(1, n)])
    advantages, mask = torch.ones(n, 3), torch.tensor([[1.0, 1.0, 0.0]] * n)
    log.completions = completion_rows(6, texts, {"reward/a": scores}, advantages, mask, limit=100)
    state = SimpleNamespace(is_world_process_zero=True, global_step=7, max_steps=9)
    log.on_log(None, state, None, logs={"loss": 0.5})
    log.flush()
    return folder / "completions" / "step_000007.parquet"


def test_completions_are_read_by_pandas_and_datasets_whatever_their_text(tmp_path):
    import datasets
    import pandas

    path = write(tmp_path, prompt=["p"] * len(ODD), completion=ODD)
    frame = pandas.read_parquet(path)
    assert list(frame.columns) == ["step", "prompt", "completion", "reward/a", "advantage", "tokens"]
    assert list(frame["completion"]) == [*ODD[:2], "half a pair ?", *ODD[3:]]
    assert math.isnan(frame["reward/a"][0])
    assert list(frame["reward/a"])[1:] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert set(frame["advantage"]) == {1.0}
    assert set(frame["tokens"]) == {2}
    assert set(frame["step"]) == {6}
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["completion"][1] == ODD[1]


def test_chat_prompts_stand_in_the_table_as_json(tmp_path):
    import pandas

    messages = [{"role": "user", "content": "Grüezi"}]
    path = write(tmp_path, prompt=[messages, messages], completion=["a", "b"])
    assert json.loads(pandas.read_parquet(path)["prompt"][0]) == messages


def test_a_column_without_any_value_has_the_type_of_the_others(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write(tmp_path, prompt=["p"], completion=["c"])  # its only reward is missing
    assert pq.read_schema(path).field("reward/a").type == pa.float64()


def test_as_many_completions_are_kept_as_the_recipe_says(tmp_path):
    import pandas

    runs.trained(tmp_path, logging={"completions": 3})
    frame = pandas.read_parquet(tmp_path / "completions")
    assert len(frame) == 3
    assert {"reward/early", "reward/total", "advantage", "tokens", "finish_reason"} <= set(frame.columns)
    runs.trained(tmp_path / "none", logging={"completions": 0})
    assert not (tmp_path / "none" / "completions").exists()


# Meters


def test_meters_average_sums_over_counts_and_numbers_over_entries_and_add_up_health():
    meters, accelerator = MetricAggregator(), Accelerator(cpu=True)
    meters.add("policy/loss", torch.tensor(6.0), torch.tensor(2.0))
    meters.add("policy/loss", 3.0, 1.0)
    meters.add("nothing", 0.0, 0.0)
    for x in (1.0, 2.0):
        meters.put("rollout/length/mean", x)
        meters.put("health/reward_missing", x)
    meters.put("infinite", math.inf)
    assert meters.read(accelerator) == {"policy/loss": 3.0, "rollout/length/mean": 1.5, "health/reward_missing": 3.0}
    assert meters.read(accelerator) == {}


def test_meters_go_on_from_their_state(tmp_path):
    one, other, accelerator = MetricAggregator(), MetricAggregator(), Accelerator(cpu=True)
    one.add("a", torch.tensor(1.0), torch.tensor(4.0))
    one.put("b", 1.0)
    save_state(tmp_path, 0, {"meters": one.state_dict()})
    other.load_state_dict(load_state(tmp_path, 0)["meters"])
    for meters in (one, other):
        meters.add("a", 2.0, 1.0)
        meters.put("b", 2.0)
    assert one.read(accelerator) == other.read(accelerator) == {"a": 0.6, "b": 1.5}


def test_seconds_are_measured_per_phase():
    meters = MetricAggregator()
    with meters.time("reward"):
        pass
    assert 0 <= meters.read(Accelerator(cpu=True))["time/reward_s"] < 1


# Names never meet


def test_two_reward_sources_of_one_plugin_have_metrics_and_columns_of_their_own(tmp_path):
    other = {"use": "format", "pattern": "nothing like it", "label": "never"}
    runs.trained(tmp_path, rewards=[runs.FORMAT, other])
    entry = lines(tmp_path)[0]
    assert entry["reward/never/mean"] == 0 < entry["reward/early/mean"]
    assert entry["reward/total/mean"] == pytest.approx(entry["reward/early/mean"])
    import pandas

    assert {"reward/early", "reward/never"} <= set(pandas.read_parquet(tmp_path / "completions").columns)


@dataclass(kw_only=True)
class Claims(PolicyLoss):
    """A policy loss that calls a metric of its own `ratio`."""

    name = "claims"

    def __call__(self, logps: Any, old_logps: Any, advantages: Any, mask: Any) -> Any:
        return -logps * advantages * mask, {"ratio": torch.full_like(mask, 5.0)}


def test_a_metric_of_a_policy_loss_cannot_take_the_name_of_a_measured_one(tmp_path):
    made = runs.trainer(tmp_path, policy_loss=Claims())
    with pytest.raises(ValueError, match="policy_loss=claims returns the metric 'ratio', but policy/ratio is measured"):
        made.train(overwrite=True)
    made.close()


# Trackers


def tracked(folder: Path, tracker: str) -> RLHFTrainer:
    """A trainer of two steps that reports to `tracker`, with prompts to evaluate on."""
    model, tokenizer = tiny_policy()
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=tracker,
        disable_tqdm=True,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
    )
    data = runs.problems()
    return RLHFTrainer(
        model, runs.recipe(), args, train_dataset=data, eval_dataset=data[:2], processing_class=tokenizer
    )


def test_tensorboard_gets_every_number_under_train_and_eval(tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    made = tracked(tmp_path, "tensorboard")
    made.evaluate()
    made.train(overwrite=True)
    made.evaluate()
    made.close()
    (folder,) = (tmp_path / "runs").iterdir()
    read = events.EventAccumulator(str(folder))
    read.Reload()
    tags = set(read.Tags()["scalars"])
    assert {"train/reward/early/mean", "train/policy/loss", "eval/reward/total/mean", "train/time/rollout_s"} <= tags
    assert [event.step for event in read.Scalars("eval/reward/total/mean")] == [0, 2]
    logged = {entry["step"]: entry for entry in made.state.log_history if "policy/loss" in entry}
    for event in read.Scalars("train/policy/loss"):
        assert event.value == pytest.approx(logged[event.step]["policy/loss"])


def test_a_tracker_is_ended_by_close_and_lets_the_trainer_be_collected(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    ended = []
    monkeypatch.setattr(TensorBoardCallback, "on_train_end", lambda *_, **__: ended.append("end"))
    made = tracked(tmp_path, "tensorboard")
    made.train(overwrite=True)
    assert ended == []
    made.close()
    made.close()
    assert ended == ["end"]
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


class Broken(TrainerCallback):
    """Fails at some of its calls."""

    def __init__(self, fails: Any):
        self.calls, self.fails = 0, fails

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.fails(self.calls):
            raise ConnectionResetError("gone")


@pytest.mark.parametrize(
    ("fails", "patience", "calls"),
    [(lambda i: True, 3, 3), (lambda i: i % 3, 3, 10), (lambda i: True, None, 10)],
    ids=["given_up_after_three", "goes_on_when_it_recovers", "never_given_up"],
)
def test_a_tracker_that_fails_is_warned_about_once_and_stops_nothing(caplog, fails, patience, calls):
    broken = guard(Broken(fails), patience)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            assert broken.on_log(None, None, None, logs={}) is None
    assert broken.calls == calls
    assert [r.message for r in caplog.records] == [
        "Broken failed; training continues without it. ConnectionResetError: gone"
    ]


def test_a_tracker_can_still_be_removed_by_its_class(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    made = tracked(tmp_path, "tensorboard")
    made.remove_callback(TensorBoardCallback)
    made.train(overwrite=True)
    made.close()
    assert not (tmp_path / "runs").exists()


def test_the_control_that_a_callback_returns_reaches_the_trainer():
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return "stop"

    assert guard(Stop()).on_step_end(None, None, None) == "stop"
