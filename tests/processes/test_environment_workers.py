"""Environments with `workers: processes`: episodes as inline, and one that blocks or dies costs itself alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.axes import Environment, WorkerError
from hf_rlhf.training.environments.episode import EnvironmentFailure
from tests.helpers.environments import AtOnce, Hashed, Says, Served, opened, play
from tests.helpers.paths import environment as variables
from tests.helpers.talks import Awaited, Endless, Keeps, Odd, Patient, Post, Talk
from tests.helpers.waits import scaled, until

ALL = (Talk, Awaited)
FINE = ["", "", ""]


def played(environment: Environment, does: list[str], engine: Says | None = None) -> Any:
    with opened(environment):
        return play(
            environment, engine or Says(texts=("x", "yzab")), ["ab", "c", "de"][: len(does)], columns={"does": does}
        )


def children() -> set[int]:
    return {int(x) for file in Path("/proc/self/task").glob("*/children") for x in file.read_text().split()}


@pytest.mark.parametrize("kind", ALL)
def test_episodes_are_the_same_in_processes_and_inline(kind):
    inline, apart = (played(kind(workers=workers, num_workers=3), FINE) for workers in ("inline", "processes"))
    one, other = dict(inline.completions.columns), dict(apart.completions.columns)
    assert set(one.pop("episode/pid")) == {os.getpid()}
    assert os.getpid() not in other.pop("episode/pid")
    assert one == other
    assert one["episode/turn_rewards"] == [[0.5, 1.0]] * 3
    assert one["episode/reason"] == ["length"] * 3
    assert (inline.completions.ids, inline.completions.masks) == (apart.completions.ids, apart.completions.masks)
    assert inline.messages == apart.messages


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("does", "end", "reason"),
    [
        ("raise", "error", "raised KeyError: 'port'"),
        ("exit", "error", "raised SystemExit: 3"),
        ("die", "error", "its process ended with exit code 3"),
        ("spin", "timeout", "took over 1 s between two turns"),
    ],
)
def test_an_episode_that_fails_or_blocks_costs_itself_alone(kind, does, end, reason):
    before = children()
    found = played(kind(workers="processes", num_workers=2, timeout=1.0), ["", does, ""])
    assert found.completions.columns["episode/end"] == ["played", end, "played"]
    assert found.reasons == ["", reason, ""]
    assert found.completions.columns["episode/turn_rewards"] == [[0.5, 1.0], None, [0.5, 1.0]]
    assert children() <= before


def test_an_episode_that_is_killed_takes_its_children_with_it():
    file = Path(f"/tmp/{os.getpid()}.pid")
    found = played(Talk(workers="processes", num_workers=2, timeout=1.0), ["", "child"])
    assert found.completions.columns["episode/end"] == ["played", "timeout"]
    child = Path(f"/proc/{file.read_text()}/stat")
    file.unlink()
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_no_more_episodes_play_at_a_time_than_there_are_processes():
    engine = Says(texts=("x", "yz"))
    found = played(Talk(workers="processes", num_workers=2), FINE, engine)
    assert [len(texts) for texts, _ in engine.calls] == [2, 2, 1, 1]
    assert len(set(found.completions.columns["episode/pid"])) == 2


def test_over_is_raised_in_the_process():
    found = played(Endless(workers="processes", num_workers=3, max_turns=3), FINE)
    assert found.completions.columns["episode/end"] == ["over"] * 3
    assert [len(ends) for ends in found.completions.columns["episode/turn_ends"]] == [3] * 3
    patient = played(Patient(workers="processes", num_workers=3, max_turns=1), FINE)
    assert patient.completions.columns["episode/reward"] == [0.25] * 3


def test_an_agent_in_a_process_talks_to_the_url():
    found = played(Post(workers="processes", num_workers=3, max_turns=1), ["1", "2", "1"], Says())
    assert found.completions.columns["episode/end"] == ["played", "over", "played"]
    assert found.completions.columns["episode/reward"] == [1.0, None, 1.0]


def test_an_environment_is_set_up_in_its_processes_alone():
    environment = Keeps(workers="processes", num_workers=1)
    assert played(environment, FINE).completions.columns["episode/reward"] == [1.0] * 3
    assert environment.up == 0


def test_wrong_outcomes_and_errors_end_the_run_as_inline():
    for workers in ("inline", "processes"):
        with pytest.raises(EnvironmentFailure, match="must return an Outcome, a number or None, got 'well'"):
            played(Odd(workers=workers, num_workers=1), [""])
        with pytest.raises(EnvironmentFailure, match="environment=talk raised KeyError: 'port'"):
            played(Talk(workers=workers, num_workers=1, on_error="raise"), ["raise"])


def test_what_cannot_be_sent_is_refused_by_name():
    environment = Talk(workers="processes", num_workers=1)
    environment.when = {"does": sys.modules}
    with pytest.raises(WorkerError, match="environment=talk: cannot send it to processes"):
        played(environment, FINE)
    rows: list[Any] = [lambda: None]
    with pytest.raises(WorkerError, match="environment=talk: cannot send a row to a process"):
        played(Talk(workers="processes", num_workers=1), rows)


def test_a_class_of_trl_plays_in_processes(tmp_path):
    file = tmp_path / "counter.py"
    file.write_text(
        "class Counter:\n    def reset(self, **row):\n        return None\n"
        '    def add(self, x: int) -> int:\n        """Add.\n\n        Args:\n            x: A number.\n        """\n'
        "        return x + 1\n    def get_reward(self):\n        return 0.75\n"
    )
    environment = load_plugin("environment", "trl", factory=f"{file}:Counter", workers="processes", num_workers=2)
    assert played(environment, FINE, Says(texts=("[add(1)]", "2"))).completions.columns["episode/reward"] == [0.75] * 3


def test_processes_of_a_killed_run_end(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "from tests.helpers.talks import Talk\nfrom tests.processes.test_environment_workers import played\n"
        "played(Talk(workers='processes', num_workers=2, timeout=1000.0), ['spin', 'child'])\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], env=variables())
    listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    file = Path(f"/tmp/{parent.pid}.pid")

    def of_parent() -> list[int]:
        return [
            int(x) for each in Path(f"/proc/{parent.pid}/task").glob("*/children") for x in each.read_text().split()
        ]

    until(lambda: file.exists(), scaled(60))
    pids = [*of_parent(), int(file.read_text())]
    assert len(pids) == 3, listed
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    file.unlink()
    gone = [Path(f"/proc/{pid}/stat") for pid in pids if pid != pids[0]]  # the first spins: no thread of it can run
    until(lambda: not any(x.exists() and x.read_text().rpartition(")")[2].split()[0] != "Z" for x in gone), scaled(20))
    os.kill(pids[0], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [Hashed(), Served()], ids=["lockstep", "free"])
def test_an_environment_that_asks_two_things_at_a_time_plays_in_a_process(engine: Any) -> None:
    with opened(AtOnce(workers="processes", num_workers=1)) as environment:
        assert play(environment, engine).completions.columns["episode/end"] == ["played"] * 2
