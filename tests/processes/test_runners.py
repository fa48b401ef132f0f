"""However a reward source runs, it gives the same scores, and no row that hangs, raises or dies takes another with it."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Context, Rollouts, Spans, TokenScores
from hf_rlhf.scoring.scorer import RewardError, Scorer
from tests.helpers.classifiers import TEXTS, save_sequence_classifier
from tests.helpers.flaky_rewards import (
    Asynchronous,
    ByWord,
    Counting,
    Logging,
    Outer,
    Stateful,
    Unmakeable,
    Waits,
    Whole,
)
from tests.helpers.paths import environment
from tests.helpers.waits import scaled, until

SLACK_S = 5.0
"""Seconds that a busy machine may add."""
HERE = ["threads", "processes"]
EVERYWHERE = ["inline", *HERE, "ray"]
CONTEXT = Context(device=torch.device("cpu"), tokenizer=None, policy=None)


def rollouts(completions: list[str], columns: Any = None) -> Rollouts:
    """A token per character, and the end of the sequence."""
    ids = [[*map(ord, text), 1] for text in completions]
    return Rollouts(
        prompts=["?"] * len(ids),
        completions=list(completions),
        prompt_ids=[[2]] * len(ids),
        completion_ids=ids,
        masks=[[1] * len(row) for row in ids],
        finish_reasons=["stop"] * len(ids),
        columns=dict(columns or {}),
        group_ids=list(range(len(ids))),
    )


def asked(source: Any, completions: list[str], seed: tuple[Any, ...] = (), columns: Any = None) -> Any:
    given = rollouts(completions, columns=columns)
    with Scorer([("mine", source)], CONTEXT) as scorer:
        return scorer.ask(given, *seed)["mine"]


def texts_of(rows: int) -> list[str]:
    return [f"row {i} " + "x" * (i % 7) for i in range(rows)]


def lengths(texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


@pytest.fixture(scope="module", autouse=True)
def _ray_ends():
    yield
    import sys

    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.mark.parametrize("workers", EVERYWHERE)
def test_scores_are_the_same_wherever_a_source_runs(workers):
    if workers == "ray":
        pytest.importorskip("ray")
    texts = [*texts_of(9), "none", "steps of two", "tokens", "", "é漢"]
    found = asked(ByWord(workers=workers, num_workers=2, extra=0.5), texts).answers
    numbers = [x + 0.5 for x in lengths(texts)]
    assert found[:9] == numbers[:9]
    assert math.isnan(found[9])
    assert found[10] == Spans([(2, 0.5), (12, -1.0)])
    assert found[11] == TokenScores([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found[12:] == numbers[12:]


@pytest.mark.parametrize("workers", ["inline", "processes", "ray"])
def test_random_numbers_depend_on_the_seed_and_the_row_alone(workers):
    if workers == "ray":
        pytest.importorskip("ray")
    texts = ["draw", "draw", "row", "draw"]
    found = asked(ByWord(workers=workers, num_workers=2), texts, seed=(3, "reward")).answers
    again = asked(ByWord(), texts, seed=(3, "reward")).answers
    assert found == again
    assert len({found[0], found[1], found[3]}) == 3
    assert asked(ByWord(), texts, seed=(4, "reward")).answers != found


@pytest.mark.parametrize("workers", ["inline", *HERE])
@pytest.mark.parametrize("what", ["raise", "exit"])
def test_a_row_that_raises_or_exits_loses_its_own_score_alone(workers, what, caplog):
    texts = texts_of(8)
    texts[3] = f"{what} it"
    with caplog.at_level(logging.WARNING):
        found = asked(ByWord(workers=workers, num_workers=2), texts)
    assert math.isnan(found.answers[3])
    assert [x for i, x in enumerate(found.answers) if i != 3] == [x for i, x in enumerate(lengths(texts)) if i != 3]
    (failure,) = found.failures
    assert (failure.row, failure.kind) == (3, "error")
    assert "flaky_rewards.py" in failure.reason
    assert f"reward 'mine' (ByWord) {failure.reason}: row 3, which get no score" in caplog.text


@pytest.mark.parametrize("workers", ["inline", *HERE])
@pytest.mark.parametrize("what", ["sleep", "spin"])
def test_a_row_that_hangs_is_given_up_after_its_time(workers, what):
    if (workers, what) == ("threads", "spin"):
        pytest.skip("a thread that spins would go on and slow the tests after it")
    texts = texts_of(8)
    texts[2] = f"{what} for an hour"
    source = ByWord(workers=workers, num_workers=2, timeout=1.0)
    with Scorer([("mine", source)], CONTEXT) as scorer:
        scorer.ask(rollouts(texts_of(4)))  # the workers are there
        started = time.monotonic()
        found = scorer.ask(rollouts(texts))["mine"]
        assert time.monotonic() - started < scaled(1.0 + SLACK_S)
    assert [x.kind for x in found.failures] == ["timeout"]
    assert [math.isnan(x) for x in found.answers] == [i == 2 for i in range(8)]
    assert found.failures[0].reason == "took over 1 s"


def test_a_call_that_never_lets_the_interpreter_go_is_killed():
    found = asked(ByWord(workers="processes", num_workers=1, timeout=1.0), ["power of nine", "after it"])
    assert [x.kind for x in found.failures] == ["timeout"]
    assert found.answers[1] == 8.0


@pytest.mark.parametrize("workers", HERE)
def test_nan_is_warned_of_once_wherever_the_source_runs(workers, caplog):
    texts = ["row", "nan here", "none here", "nan there"]
    with Scorer([("mine", ByWord(workers=workers, num_workers=1))], CONTEXT) as scorer:
        for _ in range(2):
            found = scorer.ask(rollouts(texts), counts=False)["mine"]
            assert found.invalid == [1, 3]
            assert [math.isnan(x) for x in found.answers] == [False, True, True, True]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.startswith("reward 'mine' (ByWord) returned NaN or an infinite number, rows 1, 3: ")


def test_a_process_that_dies_is_replaced():
    texts = ["die now", "die again", *texts_of(6)]
    found = asked(ByWord(workers="processes", num_workers=2, failure_budget=1.0), texts)
    assert [failure.row for failure in found.failures] == [0, 1]
    assert all("ended with exit code 139" in failure.reason for failure in found.failures)
    assert found.answers[2:] == lengths(texts[2:])


def test_an_actor_gets_its_resources_and_one_that_is_killed_is_replaced():
    pytest.importorskip("ray")
    import ray

    if not ray.is_initialized():
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, configure_logging=False)
    half = ray.cluster_resources()["CPU"] / 2  # two actors fill the cluster: a third one waits until one has ended
    here = ray.nodes()[0]["NodeManagerAddress"]
    for place in ("spread", here):
        given = {"workers": "ray", "num_workers": 2, "resources": {"num_cpus": half, "placement": place}}
        found = asked(ByWord(**given, failure_budget=1.0), ["die now", "assigned", "assigned", *texts_of(6)])
        assert [failure.row for failure in found.failures] == [0]
        assert "its actor ended" in found.failures[0].reason
        assert found.answers[1:3] == [half, half]
        assert found.answers[3:] == lengths(texts_of(6))


@pytest.mark.slow
def test_a_reward_model_runs_in_an_actor_and_is_loaded_again_when_that_is_killed(tmp_path):
    ray = pytest.importorskip("ray")
    chosen = {"model": save_sequence_classifier(tmp_path), "retries": 1}
    here = asked(load_plugin("rewards", "reward_model", **chosen), TEXTS).answers
    source = load_plugin("rewards", "reward_model", **chosen, workers="ray", resources={"num_cpus": 0.5})
    with Scorer([("mine", source)], CONTEXT) as scorer:
        scorer.wait()
        assert scorer.ask(rollouts(TEXTS), 0)["mine"].answers == here
        (actor,) = scorer._runners["mine"]._workers
        ray.kill(actor._actor)
        assert scorer.ask(rollouts(TEXTS), 1)["mine"].answers == here
    assert source._loaded is None, "not in this process"


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"num_gpus": 99}, "2 actors of 99 GPU each need 198, and the Ray cluster has"),
        ({"placement": "10.9.9.9"}, "the Ray cluster has no node:10.9.9.9; it has node:"),
        ({"gpus": 1}, "resources has no 'gpus'; choose from num_cpus, num_gpus, placement"),
        ({"num_cpus": "two"}, "resources.num_cpus must be a number of at least 0, got 'two'"),
        ({"num_gpus": 1.5}, "resources.num_gpus must be a whole number above 1, got 1.5"),
        ({"placement": 3}, "resources.placement must be spread or a node's address, got 3"),
    ],
)
def test_resources_that_the_cluster_does_not_have_are_refused_before_an_actor_waits_for_them(resources, says):
    pytest.importorskip("ray")
    with pytest.raises(RewardError, match=re.escape(says)):
        asked(ByWord(workers="ray", num_workers=2, resources=resources), ["row"])


def test_memory_of_a_process_is_bounded():
    found = asked(ByWord(workers="processes", num_workers=1, memory_mib=2048), ["eat it all", "row"])
    assert "MemoryError" in found.failures[0].reason
    assert found.answers[1] == 3.0


def test_a_killed_process_takes_its_children_with_it():
    asked(ByWord(workers="processes", num_workers=1, timeout=1.0), ["child", "row"])
    time.sleep(0.2)
    assert "sleep 3601" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_closing_leaves_no_process():
    scorer = Scorer([("mine", ByWord(workers="processes", num_workers=2))], CONTEXT)
    scorer.ask(rollouts(texts_of(4)))
    pids = [worker._process.pid for worker in scorer._runners["mine"]._workers]
    assert len(pids) == 2
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    scorer.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_a_process_prints_does_not_disturb_its_answers(capfd):
    assert asked(ByWord(workers="processes", num_workers=1), ["print this"]).answers == [10.0]
    assert "printed" in capfd.readouterr().err


def test_the_state_of_a_source_reaches_its_processes_and_its_logs_come_back():
    source = Counting(workers="processes", num_workers=2)
    with Scorer([("mine", source)], CONTEXT) as scorer:
        assert scorer.ask(rollouts(["abcd", "efgh"]))["mine"].answers == [100.0, 100.0]
        source.observe({})
        source.observe({})
        found = scorer.ask(rollouts(["abcd", "efgh", "ij"]))["mine"]
    assert found.answers == [102.0] * 3
    assert found.columns == {"heads": ["abc", "efg", "ij"]}
    assert found.metrics == {"size": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize("workers", ["inline", *HERE])
def test_a_source_of_whole_rollouts_fails_as_a_whole(workers):
    source = Whole(workers=workers, num_workers=1)
    with Scorer([("mine", source)], CONTEXT) as scorer:
        assert scorer.ask(rollouts(["a", "bb"]))["mine"].answers == [1.0, 2.0]
        found = scorer.ask(rollouts(["a", "raise", "ccc"]))["mine"]
    assert all(map(math.isnan, found.answers))
    assert [failure.row for failure in found.failures] == [0, 1, 2]


@pytest.mark.parametrize("workers", ["inline", *HERE])
def test_an_answer_that_is_none_ends_the_run_wherever_it_was_given(workers):
    with pytest.raises(RewardError, match=r"reward 'mine', row 1: an answer must be a number, None, .* got 'a word'"):
        asked(ByWord(workers=workers, num_workers=1), ["row", "word"])


@pytest.mark.parametrize("workers", ["inline", *HERE])
def test_a_row_is_tried_again(workers, tmp_path):
    texts = ["row", f"once {tmp_path / 'file'}"]
    found = asked(ByWord(workers=workers, num_workers=1, retries=1), texts)
    assert found.answers == [3.0, 7.0]
    assert not found.failures


def test_a_failure_may_give_a_number():
    assert asked(ByWord(on_error=-1.0), ["row", "raise"]).answers == [3.0, -1.0]


def test_a_failure_may_end_the_run():
    with pytest.raises(
        RewardError, match=r"reward 'mine' \(ByWord\) raised ValueError: cannot score 'raise'.*row 1"
    ) as error:
        asked(ByWord(on_error="raise"), ["row", "raise"])
    assert isinstance(error.value.__cause__, ValueError)


def test_a_source_whose_first_call_fails_for_every_row_ends_the_run():
    with pytest.raises(RewardError, match="as for every row so far"):
        asked(ByWord(), ["raise"] * 8)
    asked(ByWord(), ["raise"])  # a single row says little


def test_a_source_that_keeps_failing_ends_the_run_and_its_traceback_is_logged_once(caplog):
    with Scorer([("mine", ByWord(failure_budget=0.25))], CONTEXT) as scorer:

        def ask(failing: int, rows: int = 8) -> None:
            scorer.ask(rollouts(["raise"] * failing + ["row"] * (rows - failing)))

        for failing in (2, 4, 8, 2, 4, 4):  # two in eight are within the budget
            ask(failing)
        ask(4, rows=4)  # too few to judge by
        with pytest.raises(RewardError, match=r"more than 25% of its rows failed 3 times in a row"):
            ask(0, rows=4)
    half = rollouts(["raise"] * 4 + ["row"] * 4)
    with Scorer([("mine", ByWord(failure_budget=0.25))], CONTEXT) as scorer:
        caplog.clear()
        scorer.ask(half)
        scorer.ask(half)
        with pytest.raises(RewardError, match="Its traceback is above"):
            scorer.ask(half)
    assert caplog.text.count("Traceback") == 1


def test_async_sources_are_awaited_together():
    sources = [(f"s{i}", Asynchronous(timeout=1.0)) for i in range(3)]
    texts = texts_of(20)
    texts[4] = "sleep"
    texts[5] = "raise"
    started = time.monotonic()
    with Scorer(sources, CONTEXT) as scorer:
        found = scorer.ask(rollouts(texts))
    assert time.monotonic() - started < scaled(1.0 + SLACK_S)  # one after the other: three seconds for the sleep alone
    for one in found.values():
        assert {(failure.row, failure.kind) for failure in one.failures} == {(4, "timeout"), (5, "error")}
        assert [x for i, x in enumerate(one.answers) if i not in (4, 5)] == [
            x for i, x in enumerate(lengths(texts)) if i not in (4, 5)
        ]


def test_an_async_source_that_holds_up_the_loop_is_left_behind():
    with Scorer([("mine", Asynchronous(timeout=0.5, failure_budget=1.0))], CONTEXT) as scorer:
        assert scorer.ask(rollouts(["row"]))["mine"].answers == [3.0]
        started = time.monotonic()
        found = scorer.ask(rollouts(["block for two seconds", "row"]))["mine"]
        assert time.monotonic() - started < scaled(1.0 + SLACK_S)
        assert [failure.kind for failure in found.failures] == ["timeout", "timeout"]
        assert scorer.ask(rollouts(["row"]))["mine"].answers == [3.0]


def test_sources_see_only_the_rows_that_they_are_for():
    columns = {"task": ["maths", "code", "maths", "prose"], "level": [1, 1, 2, 2]}
    texts = ["a", "raise", "ccc", "raise"]
    found = asked(ByWord(when={"task": "maths"}), texts, columns=columns)
    assert [x if x == x else None for x in found.answers] == [1.0, None, 3.0, None]
    assert not found.failures
    both = asked(ByWord(when={"task": ["maths", "code"], "level": 2}), texts, columns=columns)
    assert [x if x == x else None for x in both.answers] == [None, None, 3.0, None]
    assert not asked(ByWord(when={"task": "none"}), texts, columns=columns).failures


def test_final_answers_come_from_the_workers_too():
    with Scorer([("mine", ByWord(workers="processes", num_workers=2))], CONTEXT) as scorer:
        assert scorer.final_answers("mine", ["it is 5", "", "7"]) == ["5", None, "7"]


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_function_of_a_file_runs_anywhere(workers, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(completions, log_metric, **columns):\n"
        "    log_metric('rows', len(completions))\n"
        "    if completions[0] == 'x':\n        raise ValueError('an x')\n"
        "    return [len(text) for text in completions]\n"
    )
    settings = {"function": f"{file}:score", "workers": workers, "num_workers": 1, "rowwise": True}
    found = asked(load_plugin("rewards", "function", **settings), ["ab", "x", "cde"])
    assert [x if x == x else None for x in found.answers] == [2.0, None, 3.0]
    assert found.metrics == {"rows": [1.0, 1.0, 1.0]}
    assert "an x" in found.failures[0].reason


SLOW_TO_LOAD = """
import sys
import time

time.sleep(1.5)

def open(completions, **kwargs):
    return [float("transformers" in sys.modules)] * len(completions)
"""


@pytest.mark.parametrize("workers", ["inline", *HERE])
def test_what_a_function_imports_is_outside_its_time_limit_also_after_a_respawn(workers, tmp_path):
    file = tmp_path / "slow_to_load.py"
    file.write_text(SLOW_TO_LOAD)
    source = load_plugin(
        "rewards", "function", function=f"{file}:open", workers=workers, num_workers=1, rowwise=True, timeout=1.0
    )
    with Scorer([("mine", source)], CONTEXT) as scorer:
        scorer.wait()
        found = scorer.ask(rollouts(texts_of(3)))["mine"]
        assert not found.failures
        if workers == "processes":  # where nothing else has imported it
            assert found.answers == [0.0, 0.0, 0.0], "it does not read trainer_state"
            pool = scorer._runners["mine"]
            (worker,) = pool._workers
            worker._process.kill()
            until(lambda: not pool._events.empty(), 10)
            assert not scorer.ask(rollouts(texts_of(3)))["mine"].failures


STATES = """
import sys

def named(completions, trainer_state):
    return [float("transformers.trainer_callback" in sys.modules) + trainer_state.global_step] * len(completions)

def through_kwargs(completions, **kwargs):
    return [float("transformers.trainer_callback" in sys.modules) + kwargs["trainer_state"].max_steps] * len(completions)
"""


@pytest.mark.parametrize("name", ["named", "through_kwargs"])
def test_the_state_that_a_function_reads_is_imported_before_its_first_call(name, tmp_path):
    file = tmp_path / "states.py"
    file.write_text(STATES)
    source = load_plugin("rewards", "function", function=f"{file}:{name}", workers="processes", num_workers=1)
    assert asked(source, ["a"]).answers == [1.0]


def test_a_state_that_only_a_helper_reads_is_made_when_it_is_read(tmp_path):
    file = tmp_path / "rewards_of_step.py"
    file.write_text(
        "def late(completions, **kwargs):\n    state = kwargs['trainer' + '_state']\n"
        "    return [state.global_step + state.max_steps + float(state.best_metric is None) for _ in completions]\n"
    )
    source = load_plugin("rewards", "function", function=f"{file}:late")
    source.load_state_dict({"rollouts": 7})
    assert asked(source, ["a"]).answers == [8.0]


def test_a_function_that_is_given_itself_runs_in_processes():
    bonus = 5.0
    source = load_plugin("rewards", "function", function=lambda completions: [bonus] * len(completions))
    source.workers, source.num_workers = "processes", 1
    assert asked(source, ["a", "b"]).answers == [5.0, 5.0]


def test_a_plugin_of_a_file_runs_in_processes(tmp_path):
    from hf_rlhf.registry.host import Host

    file = tmp_path / "my_plugin.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom hf_rlhf import hookimpl\nfrom hf_rlhf.axes import RewardSource\n\n"
        "@dataclass(kw_only=True)\nclass Mine(RewardSource):\n    'Twos.'\n    name = 'mine'\n"
        "    def __call__(self, rollouts):\n        return [2.0] * len(rollouts)\n\n"
        "@hookimpl\ndef rewards():\n    return [Mine]\n"
    )
    host = Host(disable="")
    host.configure([str(file)])
    source = host.get("rewards", "mine")(workers="processes", num_workers=1)
    assert asked(source, ["a"]).answers == [2.0]


def test_a_function_that_is_not_there_says_so_from_its_process():
    source = load_plugin("rewards", "function", function="nowhere.py:nothing", workers="processes", num_workers=1)
    with pytest.raises(RewardError, match=r"its workers \(processes\) do not start: .*no such file"):
        asked(source, ["a"])


def test_a_source_that_cannot_be_made_in_a_process_says_why():
    with pytest.raises(RewardError, match=r"its workers \(processes\) do not start: .*ImportError: not here"):
        asked(Unmakeable(workers="processes"), ["a"])


def test_what_cannot_be_sent_to_a_process_is_refused_by_name():
    lock = threading.Lock()
    source = load_plugin("rewards", "function", function=lambda completions: [lock.locked()])
    source.workers = "processes"
    with pytest.raises(RewardError, match="cannot send it to processes"):
        asked(source, ["a"])


def test_timers_of_others_are_put_back():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100.0)
        asked(ByWord(timeout=5.0), ["a"])
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 90 < left <= 100
        signal.raise_signal(signal.SIGALRM)
        assert rang == [1]
    finally:
        signal.signal(signal.SIGALRM, before)


def ended(pid: int) -> bool:
    """Whether a process has ended, though an init process that is slow may still list it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_processes_give_way_when_their_parent_is_gone(tmp_path):
    """A process whose parent was killed ends by itself, even in the middle of a call, and so do its children."""
    script = tmp_path / "main.py"
    script.write_text(
        "import torch\nfrom tests.helpers.flaky_rewards import ByWord\nfrom hf_rlhf.batch import Context\n"
        "from hf_rlhf.scoring.scorer import Scorer\nfrom hf_rlhf.testing import rollouts\n"
        "scorer = Scorer([('mine', ByWord(workers='processes', num_workers=1, timeout=1000.0))])\n"
        "print([w._process.pid for w in scorer._runners['mine']._workers][0], flush=True)\n"
        "scorer.ask(rollouts(['row']))\nprint('ready', flush=True)\n"
        "scorer.ask(rollouts(['child']))\n"
    )
    import sys

    parent = subprocess.Popen([sys.executable, str(script)], env=environment(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until(lambda: ended(pid), 10)
    assert "sleep 3601" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_one_row_hangs_and_one_raises_among_four_sources(caplog):
    """64 rows: the step takes the time limit and a second, and 62 rows keep every score."""
    hangs, raises = texts_of(64), 40
    hangs[17] = "sleep for an hour"
    given = rollouts(hangs)
    columns = {"text": list(hangs)}
    given.columns = columns
    sources = [
        ("hangs", ByWord(workers="processes", num_workers=2, timeout=2.0)),
        ("raises", load_plugin("rewards", "function", function=raising(raises), rowwise=True)),
        ("inline", load_plugin("rewards", "length")),
        ("threads", load_plugin("rewards", "missing_eos", workers="threads")),
    ]
    with Scorer(sources, CONTEXT) as scorer, caplog.at_level(logging.WARNING):
        scorer.ask(rollouts(texts_of(4)))
        started = time.monotonic()
        found = scorer.ask(given)
        took = time.monotonic() - started
    assert took < scaled(2.0 + SLACK_S)
    missing = {label: [i for i, x in enumerate(one.answers) if x != x] for label, one in found.items()}
    assert missing == {"hangs": [17], "raises": [raises], "inline": [], "threads": []}
    assert "reward 'hangs' (ByWord) took over 2 s: row 17, which get no score" in caplog.text
    assert re.search(rf"reward 'raises' \(Function\) raised RuntimeError: .*no 40.*: row {raises}, which", caplog.text)


def raising(row: int) -> Any:
    def score(completions: list[str]) -> list[float]:
        if completions[0].startswith(f"row {row} "):
            raise ValueError(f"no {row}")
        return [1.0] * len(completions)

    return score


# Errors of odd kinds


@pytest.mark.parametrize("workers", ["inline", *HERE])
@pytest.mark.parametrize("what", ["caused", "cancel"])
def test_errors_without_a_place_and_cancellations_are_failures_of_their_row(workers, what):
    found = asked(ByWord(workers=workers, num_workers=1, timeout=30.0), [what, "row"])
    assert [failure.kind for failure in found.failures] == ["error"]
    assert found.answers[1] == 3.0


@pytest.mark.parametrize("what", ["caused", "cancel", "exit", "expire"])
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_errors_of_odd_kinds_stay_with_their_row_of_an_async_source(what, timeout):
    found = asked(Asynchronous(timeout=timeout), [what, "row"])
    assert [failure.kind for failure in found.failures] == ["error"]
    assert found.answers[1] == 3.0


def test_a_source_with_an_alarm_of_its_own_leaves_the_next_row_its_limit():
    found = asked(ByWord(timeout=1.0), ["alarm", "sleep", "row"])
    assert [(failure.row, failure.kind) for failure in found.failures] == [(1, "timeout")]
    assert found.answers[2] == 3.0


# State, logs, nested sources


@pytest.mark.parametrize("seen", [torch.tensor([1.0, 2.0]), [0.0]])
def test_state_of_any_kind_reaches_the_processes_each_time(seen):
    source = Stateful(workers="processes", num_workers=1)
    source.seen = seen
    with Scorer([("mine", source)], CONTEXT) as scorer:
        first = scorer.ask(rollouts(["a"]))["mine"].answers
        if isinstance(seen, list):
            seen.append(5.0)
        second = scorer.ask(rollouts(["a"]))["mine"].answers
    assert first == [float(sum(seen[: 2 if torch.is_tensor(seen) else 1]))]
    assert second == [float(sum(seen))]


def test_metrics_are_numbers_from_everywhere_and_survive_retries(tmp_path):
    for workers in ("inline", *HERE):
        texts = ["row", f"once {tmp_path / workers}"]
        found = asked(Logging(workers=workers, num_workers=1, retries=1), texts)
        assert found.metrics == {"size": [0.5, 0.5, 0.5]}, workers
        assert not found.failures


def test_a_column_logged_by_rows_beside_each_other_is_dropped_with_a_reason(caplog):
    with caplog.at_level(logging.WARNING):
        found = asked(Counting(workers="threads", num_workers=2), ["abc", "def"])
    assert found.columns == {}
    assert "values cannot be assigned to rows" in caplog.text


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_source_within_a_source_is_set_up_and_closed(workers, tmp_path):
    from tests.helpers import runs

    source = Outer(inner=Counting(), workers=workers, num_workers=1)
    made = runs.trainer(tmp_path, rewards=[source, {"use": "length", "target": 1, "maximum": 9}])
    buffer = made.collector.collect(0)
    assert (buffer.extra["numbers"]["reward/outer"] == 100).all()
    made.close()


# Ends


def test_workers_that_died_idle_cost_no_row():
    with Scorer([("mine", ByWord(workers="processes", num_workers=2))], CONTEXT) as scorer:
        scorer.ask(rollouts(texts_of(4)))
        for worker in list(scorer._runners["mine"]._workers):
            os.kill(worker._process.pid, signal.SIGKILL)
            worker._process.wait()
        time.sleep(1.5)
        assert scorer.ask(rollouts(texts_of(4)))["mine"].answers == lengths(texts_of(4))


def test_a_scorer_that_is_closed_meanwhile_says_so_and_leaves_no_process():
    scorer = Scorer([("mine", ByWord(workers="processes", num_workers=2))], CONTEXT)
    scorer.ask(rollouts(texts_of(4)))
    pids = [worker._process.pid for worker in scorer._runners["mine"]._workers]
    threading.Timer(0.5, scorer.close).start()
    with pytest.raises(RewardError, match="was closed"):
        scorer.ask(rollouts(["sleep", "sleep", "sleep"]))
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), SLACK_S)


@pytest.mark.parametrize("workers", HERE)
def test_an_interrupt_ends_the_program_at_once(workers, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "from tests.helpers.flaky_rewards import ByWord\nfrom hf_rlhf.scoring.scorer import Scorer\n"
        "from tests.processes.test_runners import rollouts\n"
        f"scorer = Scorer([('mine', ByWord(workers={workers!r}, num_workers=1, timeout=1000.0))])\n"
        "scorer.ask(rollouts(['row']))\nprint('ready', flush=True)\nscorer.ask(rollouts(['sleep']))\n"
    )
    import sys

    program = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    time.sleep(0.3)
    os.kill(program.pid, signal.SIGINT)
    try:
        assert program.wait(timeout=scaled(4 * SLACK_S)) != 0
    finally:
        program.kill()


def test_two_sources_of_one_label_are_refused():
    with pytest.raises(ValueError, match="reward sources must have distinct labels"):
        Scorer([("mine", ByWord()), ("mine", ByWord())])


def test_a_row_costs_no_more_where_there_are_many():
    """The calls that a row makes grow neither with the rows nor with their tokens."""
    import cProfile
    import pstats

    def calls(rows: int) -> float:
        with Scorer([("mine", ByWord())], CONTEXT) as scorer:
            profile = cProfile.Profile()
            profile.runcall(scorer.ask, rollouts(["x" * 50] * rows))
        return pstats.Stats(profile).total_calls / rows  # type: ignore[attr-defined]

    assert calls(1000) < 1.1 * calls(100)


# Several requests at a time


def test_threads_that_ask_a_pool_at_the_same_time_get_their_own_answers():
    source = ByWord(workers="threads", num_workers=3)
    with Scorer([("mine", source)], CONTEXT, requests=6) as scorer, ThreadPoolExecutor(6) as clients:
        batches = [[f"{'x' * (i + j)} row" for j in range(1 + i % 5)] for i in range(60)]
        found = list(clients.map(lambda texts: scorer.ask(rollouts(texts), counts=False)["mine"].answers, batches))
    assert found == [lengths(texts) for texts in batches]


@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_calls_of_whole_rollouts_run_beside_each_other_for_several_requests(workers):
    source = Waits(workers=workers, num_workers=3)
    with Scorer([("mine", source)], CONTEXT, requests=3) as scorer, ThreadPoolExecutor(3) as clients:

        def ask(text: str) -> Any:
            return scorer.ask(rollouts([text]), counts=False)["mine"].answers

        pool: Any = scorer._runners["mine"]
        until(lambda: ask("0") and all(held.ready for held in pool._workers.values()), 60, what="no workers")
        started = time.perf_counter()
        assert list(clients.map(ask, ["1", "1 a", "1 ab"])) == [[1.0], [3.0], [4.0]]
        assert time.perf_counter() - started < scaled(1.9)


@pytest.mark.parametrize("workers", ["inline", "threads", "processes"])
def test_rows_are_not_scored_once_nobody_waits(workers):
    calls: list[int] = []

    def is_cancelled() -> bool:
        calls.append(1)
        return len(calls) > 2

    with Scorer([("mine", ByWord(workers=workers, num_workers=1))], CONTEXT) as scorer:
        found = scorer.ask(rollouts(["row"] * 20), counts=False, is_cancelled=is_cancelled)["mine"]
        missing = sum(map(math.isnan, found.answers))
        assert 0 < missing < 20
        assert found.failures == []
        assert scorer.ask(rollouts(["row"]))["mine"].answers == [3.0]
