"""What runs beside something else: forwards beside rewards, tables of completions beside the next rollout."""

from __future__ import annotations

import json
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts
from hf_rlhf.metrics import jsonl_log
from hf_rlhf.metrics.jsonl_log import RunLog
from hf_rlhf.metrics.trackers import guard
from hf_rlhf.runtime.background import run_in_thread
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.scoring.scorer import RewardError
from hf_rlhf.training import collector
from tests.helpers import runs
from tests.helpers.waits import scaled, until

CPU = torch.device("cpu")
RICH: dict[str, Any] = {
    "rollout": runs.SAMPLED,
    "advantages": "gae",
    "critic": "value_head",
    "reference": "frozen",
    "kl": [{"use": "in_reward", "beta": 0.1}],
}
"""Everything that may be known of the rows before the first update."""


@dataclass(kw_only=True)
class Scores(RewardSource):
    """What a function of the rollouts gives."""

    name: ClassVar[str] = "scores"

    what: Callable[[Rollouts], Any] = field(repr=False)
    """The function."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return self.what(rollouts)


@dataclass(kw_only=True)
class Judge(Scores):
    """The same, and it says that it runs a model."""

    name: ClassVar[str] = "judge"
    provides: ClassVar[frozenset[str]] = frozenset({"reward_model"})


def threads() -> list[str]:
    """The threads that are still at work or wait for it."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hf_rlhf-beside")]


def first_forward(made: Any, call: Callable[[], None]) -> None:
    """Has `call` called before the policy's first forward after its rollout."""
    left = [call]

    def hook(*args: Any) -> None:
        if left:
            left.pop()()

    made.actor_critic.register_forward_pre_hook(hook)


def trainer(folder: Path, what: Callable[[Rollouts], Any], kind: type[Scores] = Scores, **parts: Any) -> Any:
    return runs.trainer(folder, rewards=[kind(what=what)], **{"training": {"max_steps": 1}, **parts})


# Rewards and forwards


def test_rewards_and_forwards_wait_for_each_other(tmp_path):
    """Either would give up waiting if one ran after the other."""
    scoring, forwarding, met = threading.Event(), threading.Event(), []

    def forward() -> None:
        forwarding.set()
        met.append(scoring.wait(scaled(20)))

    def score(rollouts: Rollouts) -> list[float]:
        scoring.set()
        met.append(forwarding.wait(scaled(20)))
        return [float(i) for i in range(len(rollouts))]

    made = trainer(tmp_path, score)
    first_forward(made, forward)
    made.train()
    made.close()
    assert met == [True, True]


def draws(rollouts: Rollouts) -> list[float]:
    return [random.random() + torch.rand(1).item() for _ in rollouts.completions]


@contextmanager
def one_after_the_other(work: Callable[[], Any], device: torch.device) -> Iterator[Future[Any]]:
    """As `run_in_thread`, with `work` done before the block begins."""
    done: Future[Any] = Future()
    done.set_result(work())
    yield done


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock or a memory meter says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = ("time/", "perf/", "memory/", "train_")
    return [{name: x for name, x in entry.items() if not name.startswith(skipped)} for entry in found]


@pytest.mark.parametrize("parts", [{}, RICH], ids=["scripted", "sampled_with_critic_and_reference"])
def test_the_numbers_are_those_of_one_after_the_other(tmp_path, monkeypatch, parts):
    def run(name: str) -> Tensor:
        options = {"rewards": [Scores(what=draws), runs.FORMAT], "training": {"max_steps": 4}, **parts}
        return runs.parameters(runs.trained(tmp_path / name, **options))

    overlapped = run("overlapped")
    monkeypatch.setattr(collector, "run_in_thread", one_after_the_other)
    assert torch.equal(overlapped, run("in_turn"))
    assert lines(tmp_path / "overlapped") == lines(tmp_path / "in_turn")
    tables = [sorted((tmp_path / name).glob("completions/*.parquet")) for name in ("overlapped", "in_turn")]
    assert len(tables[0]) == 2
    for one, other in zip(*tables, strict=True):
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


def test_forwards_neither_draw_nor_depend_on_the_default_dtype_and_have_no_gradient(tmp_path):
    """The generators and the default dtype are the process's: a reward may use and set them meanwhile."""
    made = runs.trainer(tmp_path, **RICH)
    known: list[dict[str, Tensor]] = []
    inner = made.collector.forwards

    def spy(*given: Any) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        generators, drawn = torch.get_rng_state().tolist(), set[int]()
        with pytest.MonkeyPatch.context() as patch:  # threads of other tests may draw from Python's generator meanwhile
            for name, draw in vars(random).items():
                if getattr(draw, "__self__", None) is random._inst:  # type: ignore[attr-defined]
                    patch.setattr(
                        random, name, lambda *a, draw=draw, **k: (drawn.add(threading.get_ident()), draw(*a, **k))[1]
                    )
            known.append(inner(*given))
            torch.set_default_dtype(torch.float64)
            try:
                known.append(inner(*given))
            finally:
                torch.set_default_dtype(torch.float32)
        assert torch.get_rng_state().tolist() == generators
        assert threading.get_ident() not in drawn
        return known[0]

    spy.references = inner.references  # type: ignore[attr-defined]
    spy.parallel = inner.parallel  # type: ignore[attr-defined]
    made.collector.forwards = spy
    with torch.enable_grad():
        made.collector.collect(0)
    made.close()
    assert {"old_logps", "ref_logps", "values"} <= known[0].keys()
    for name, x in known[0].items():
        assert not x.requires_grad
        assert torch.equal(x, known[1][name]), name


def test_rewards_keep_the_main_thread_so_that_they_may_set_alarms(tmp_path):
    rang = []

    def score(rollouts: Rollouts) -> list[float]:
        before = signal.signal(signal.SIGALRM, lambda *_: rang.append(threading.current_thread()))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        until(lambda: rang, 20, pause=0.001)
        signal.signal(signal.SIGALRM, before)
        return [0.0] * len(rollouts)

    trainer(tmp_path, score).collector.collect(0)
    assert rang == [threading.main_thread()]


def test_a_source_that_runs_a_model_waits_for_the_forwards(tmp_path):
    seen = []

    def score(rollouts: Rollouts) -> list[float]:
        seen.append("forwards done" if done.is_set() else "forwards not done")
        return [0.0] * len(rollouts)

    done = threading.Event()
    made = trainer(tmp_path, score, Judge)
    first_forward(made, lambda: time.sleep(0.05))
    made.actor_critic.register_forward_hook(lambda *_: done.set())
    made.collector.collect(0)
    assert seen == ["forwards done"]


def test_the_wait_is_what_rewards_take_after_the_forwards(tmp_path):
    scored, forwarded = threading.Event(), threading.Event()

    def logged(what: Callable[[Rollouts], Any], before_forward: Callable[[], None]) -> dict[str, float]:
        made = trainer(tmp_path, what)
        first_forward(made, before_forward)
        made.actor_critic.register_forward_hook(lambda *_: forwarded.set())
        made.collector.collect(0)
        return made.meters.read(made.accelerator)

    def quick(rollouts: Rollouts) -> list[float]:
        scored.set()
        return [0.0] * len(rollouts)

    def slow(rollouts: Rollouts) -> list[float]:
        assert forwarded.wait(scaled(20))
        time.sleep(0.05)
        return [0.0] * len(rollouts)

    found = logged(quick, lambda: time.sleep(1 if scored.wait(scaled(20)) else 0))
    assert found["time/reward_wait_s"] == 0 < found["time/reward_s"]
    forwarded.clear()
    found = logged(slow, lambda: None)
    assert found["time/reward_wait_s"] > 0


def fails(rollouts: Rollouts) -> list[float]:
    raise ValueError("no such answer")


def test_an_error_of_a_reward_is_raised_when_the_forwards_have_ended(tmp_path):
    ended = []
    made = trainer(tmp_path, fails)
    first_forward(made, lambda: time.sleep(0.05))
    made.actor_critic.register_forward_hook(lambda *_: ended.append(True))
    with pytest.raises(RewardError, match=r"reward 'scores' \(Scores\) raised ValueError: no such answer"):
        made.train()
    assert ended == [True]
    assert threads() == []


def test_an_error_of_a_forward_is_raised_when_the_rewards_have_ended(tmp_path):
    ended = []

    def score(rollouts: Rollouts) -> list[float]:
        time.sleep(0.05)
        ended.append(True)
        return [0.0] * len(rollouts)

    def out_of_memory() -> None:
        raise MemoryError("no room")

    made = trainer(tmp_path, score)
    first_forward(made, out_of_memory)
    with pytest.raises(MemoryError, match="no room"):
        made.train()
    assert ended == [True]
    assert threads() == []


def test_an_interrupted_reward_leaves_nothing_running(tmp_path):
    def interrupted(rollouts: Rollouts) -> list[float]:
        raise KeyboardInterrupt

    made = trainer(tmp_path, interrupted)
    first_forward(made, lambda: time.sleep(0.05))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert threads() == []


def test_work_beside_has_as_many_threads_as_the_rest_and_draws_stay_seeded():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with run_in_thread(torch.get_num_threads, CPU) as count, seeded(0, "reward", 0):
            drawn = random.random()
        assert count.result() == before + 1
    finally:
        torch.set_num_threads(before)
    with seeded(0, "reward", 0):
        assert random.random() == drawn


# Tables of completions

STATE = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9)


def rows(text: str = "c") -> list[dict[str, Any]]:
    return [{"step": 2, "prompt": "p", "completion": text, "reward/total": 0.5}]


def log_step(log: RunLog, step: int, text: str = "c") -> None:
    log.completions = rows(text)
    log.on_log(None, SimpleNamespace(**{**vars(STATE), "global_step": step}), None, logs={"loss": 0.5})


def slowly(monkeypatch: pytest.MonkeyPatch, gate: threading.Event, order: list[int], every_s: float = 0.0) -> None:
    """Has no log write a table until the gate is open."""
    write = jsonl_log.write_table

    def wait_and_write(output_dir: Path, table: list[dict[str, Any]], step: int) -> None:
        assert gate.wait(scaled(20))
        write(output_dir, table, step)
        order.append(step)

    monkeypatch.setattr(jsonl_log, "write_table", wait_and_write)
    monkeypatch.setattr(jsonl_log, "TABLES_EVERY_S", every_s)


def test_a_line_is_there_at_once_and_its_table_when_the_next_completions_come(tmp_path, monkeypatch):
    log, gate, order = RunLog(tmp_path, {}), threading.Event(), []
    slowly(monkeypatch, gate, order)
    log_step(log, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    assert order == []
    threading.Timer(0.02, gate.set).start()
    log_step(log, 2)
    assert order[0] == 1
    log.flush()
    assert order == [1, 2]


def test_tables_of_less_than_a_second_are_written_together(tmp_path, monkeypatch):
    log, gate, order = RunLog(tmp_path, {}), threading.Event(), []
    slowly(monkeypatch, gate, order, every_s=100.0)
    gate.set()
    for step in (1, 2, 3):
        log_step(log, step)
    log._wait()
    assert order == [1]
    log._written -= 100.0
    log_step(log, 4)
    log._wait()
    assert order == [1, 2, 3, 4]


@pytest.mark.parametrize("event", ["on_save", "on_evaluate", "on_train_end", "on_train_begin"])
def test_no_table_is_left_to_write_after(tmp_path, event, monkeypatch):
    log, gate, order = RunLog(tmp_path, {}), threading.Event(), []
    slowly(monkeypatch, gate, order, every_s=100.0)
    threading.Timer(0.02, gate.set).start()
    log_step(log, 2)
    log_step(log, 3)
    getattr(log, event)(None, STATE, None)
    assert order == [2, 3]


def test_a_table_written_beside_has_the_same_bytes(tmp_path):
    beside_it, at_once = RunLog(tmp_path / "a", {}), RunLog(tmp_path / "b", {})
    log_step(beside_it, 3)
    beside_it.flush()
    jsonl_log.write_table(at_once.output_dir, rows(), 3)
    path = Path("completions") / "step_000003.parquet"
    assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_a_table_that_cannot_be_written_is_one_warning_at_the_next_event_and_costs_no_other(tmp_path, caplog):
    log = RunLog(tmp_path, {})
    guard(log, patience=None)
    (tmp_path / "completions").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        log_step(log, 1)
        while not log._tables[0].done():
            time.sleep(0.001)
        assert not caplog.records
        (tmp_path / "completions").unlink()
        log_step(log, 2)
        log.on_train_end(None, STATE, None)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("RunLog failed; training continues without it. FileExistsError")
    assert [path.stem for path in tmp_path.glob("completions/*")] == ["step_000002"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
