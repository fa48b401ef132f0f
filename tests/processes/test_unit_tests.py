"""`unit_tests`: programs of completions against the tests of their rows."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import time

import pytest

from hf_rlhf.scoring.scorer import Scorer
from hf_rlhf.testing import conformance, rollouts
from hf_rlhf_plugins.rewards._sandbox.backend import SandboxError
from hf_rlhf_plugins.rewards.unit_tests import UnitTests
from tests.helpers import runs
from tests.helpers.sandboxes import all_stays_well, bubblewrap
from tests.helpers.waits import scaled

SQUARE = "Here it is:\n```python\ndef f(x):\n    return x * x\n```\nDone."
TESTS = ["assert f(2) == 4", "assert f(3) == 9", "assert f(4) == 15", {"call": "f(1)", "expected": 1}]


@pytest.fixture(autouse=True)
def all_is_well():
    with all_stays_well(bubblewrap()):
        yield


def scores(completions, tests, **settings):
    return UnitTests(**settings)(rollouts(completions, columns={"tests": tests}))


@pytest.mark.proves("rewards.unit_tests", how="closed form", tolerance="exact")
def test_a_score_is_the_share_of_tests_that_pass():
    wrong = "```\ndef f(x): return x + 2\n```"
    broken = [
        "def f(x) return x",
        "I do not know.",
        "",
        "```\n1 / 0\n```",
        "while True: pass",
        "import os; os._exit(0)",
    ]
    completions = [SQUARE, wrong, *broken]
    assert scores(completions, [TESTS] * 8, time_limit=1.0) == [0.75, 0.25, 0, 0, 0, 0, 0, 0]
    assert scores([SQUARE, SQUARE], [TESTS, TESTS[:2]], score="all") == [0.0, 1.0]


def test_programs_that_read_and_print_are_compared_by_what_they_print():
    program = "```python\nimport sys\nn = int(input())\nprint(sum(map(int, sys.stdin.read().split())) * n, '')\n```"
    good = [{"stdin": "2\n1 2 3\n", "stdout": "12\n"}, {"stdin": "1\n\n", "stdout": "0"}]
    bad = [{"stdin": "2\n5", "stdout": "5\n"}, {"stdin": "x", "stdout": ""}]
    assert scores([program], [good + bad]) == [0.5]
    main = "import threading\ndef f(): return 5\n"
    main += "if __name__ == '__main__': threading.Thread(target=lambda: print(f())).start()"
    assert scores([main], [[{"stdin": "", "stdout": "5"}, "assert f() == 5"]]) == [1.0]


ENDINGS = {
    "print(5)": 1.0,
    "print(5); exit()": 1.0,
    "import sys\nsys.stdout.write('5'); sys.exit(0)": 1.0,
    "f = open(1, 'w')\nf.write('5')": 1.0,
    "import io, sys\nsys.stdout = io.TextIOWrapper(open(1, 'wb'))\nprint(5)": 1.0,
    "import atexit\natexit.register(print, 5)": 1.0,
    "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print(5))).start()": 1.0,
    "import subprocess\nsubprocess.run(['echo', '5'])": 1.0,
    "import os\nif os.fork() == 0: print(5)\nelse: os.wait()": 1.0,
    "print(5); 1 / 0": 0.0,
    "print(5); exit(3)": 0.0,
    "print(5, flush=True); import os; os.abort()": 0.0,
    "print(5, flush=True)\nwhile True: pass": 0.0,
    "print(5, flush=True); import os; os.close(1); os.close(2)\nwhile True: pass": 0.0,
    "print(5": 0.0,
}


@pytest.mark.parametrize("program", ENDINGS)
def test_what_a_program_printed_counts_where_it_ended_well(program):
    assert scores([program], [[{"stdin": "", "stdout": "5"}]], time_limit=3.0) == [ENDINGS[program]]


def test_a_row_without_tests_has_no_score():
    assert scores([SQUARE] * 4, [None, [], "null", json.dumps(TESTS)]) == [None, None, None, 0.75]


def test_a_completion_without_a_block_is_a_program_or_fails():
    bare = "def f(x): return x * x"
    assert scores([bare], [TESTS[:1]]) == [1.0]
    assert scores([bare, SQUARE], [TESTS[:1]] * 2, without_fence="fail") == [0.0, 1.0]


def test_floats_are_equal_within_the_tolerance():
    program = "def f(): return 0.1 + 0.2, [1e9]"
    assert scores([program], [["assert f() == (0.3, [1000000000.1])"]]) == [1.0]
    assert scores([program], [["assert f() == (0.3, [1000000000.1])"]], tolerance=0) == [0.0]


def test_memory_is_that_of_the_setting():
    program = "def f(): return len(bytearray(300 << 20))"
    assert scores([program], [["assert f() == 314572800"]]) == [1.0]
    assert scores([program], [["assert f() == 314572800"]], program_memory_mib=256) == [0.0]


def test_a_test_of_another_form_is_refused_by_row_and_form():
    with pytest.raises(
        ValueError, match=r"row 1: column 'tests'\[2\]: .*'assert f\(2\)': it has no comparison with =="
    ):
        scores([SQUARE] * 2, [TESTS, [*TESTS[:2], "assert f(2)"]])


def test_the_final_answer_is_the_program():
    source = UnitTests()
    assert source.answer(SQUARE) == "def f(x):\n    return x * x"
    assert source.answer("  ") is None
    assert UnitTests(without_fence="fail").answer("x = 1") is None
    assert source.columns() == {"tests"}


def test_resource_limits_are_chosen_knowingly_and_labelled():
    with pytest.raises(ValueError, match=r"is not a sandbox.*i_understand_this_is_not_a_sandbox: true"):
        UnitTests(sandbox="rlimits")
    source = UnitTests(sandbox="rlimits", i_understand_this_is_not_a_sandbox=True)
    assert list(source.check(None)) == []
    assert "NOT A SANDBOX" in "".join(source.remarks(None))
    assert list(UnitTests().remarks(None)) == []
    assert source(rollouts([SQUARE], columns={"tests": [TESTS]})) == [0.75]


def test_a_sandbox_that_is_not_there_is_an_error_and_nothing_takes_its_place(monkeypatch):
    from hf_rlhf_plugins.rewards._sandbox import bubblewrap

    source, given = UnitTests(), rollouts([SQUARE], columns={"tests": [TESTS]})
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(bubblewrap, "_problem", bubblewrap._problem.__wrapped__)
    (problem,) = source.check(None)
    assert "apt-get install bubblewrap" in problem
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        source.setup(None)
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        source(given)
    monkeypatch.undo()
    assert source.setup(None) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image": "mine:1"}, "image needs sandbox docker or podman, got bubblewrap"),
        ({"url": "http://a/"}, "url needs sandbox remote"),
        ({"sandbox": "docker", "python": "python3"}, "python needs sandbox bubblewrap or rlimits"),
        ({"sandbox": "remote"}, "needs url"),
        ({"sandbox": "remote", "url": "nowhere"}, "nowhere"),
        ({"timeout": 5.0}, "more than a second above time_limit"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        UnitTests(**settings)


def test_it_keeps_the_contract_of_a_reward_source():
    tests = [["assert f(2) == 4"], TESTS, None, json.dumps([{"stdin": "", "stdout": "5"}])]
    given = rollouts([SQUARE, SQUARE, SQUARE, "print(5)"], columns={"tests": tests})
    facts = conformance(UnitTests(), rollouts=given)
    assert len(facts) >= 6
    for fact in facts:
        fact()


@pytest.mark.parametrize("workers", ["inline", "threads", "processes"])
def test_rows_are_judged_by_workers_of_every_kind(workers):
    hangs, broken = "while True: pass", "assert nothing"
    tests = [TESTS, TESTS, [broken], TESTS[:1]]
    given = rollouts([SQUARE, hangs, SQUARE, SQUARE], columns={"tests": tests})
    source = UnitTests(workers=workers, num_workers=2, time_limit=1.0, failure_budget=1.0, timeout=60.0)
    with Scorer([("code", source)]) as scorer:
        asked = scorer.ask(given)["code"]
    assert [None if x != x else x for x in asked.answers] == [0.75, 0.0, None, 1.0]
    assert [(failure.row, failure.kind) for failure in asked.failures] == [(2, "error")]
    assert "must be Python" not in asked.failures[0].reason
    assert "not a literal" in asked.failures[0].reason or "no comparison" in asked.failures[0].reason


def test_a_run_trains_on_the_scores_of_programs(tmp_path):
    programs = ["f = lambda x: x * x", "f = lambda x: x", "f = 1", "f = lambda x: 0"]
    data = [
        {"prompt": f"f{i}", "tests": [f"assert f({i}) == {i * i}", "assert f(0) == 0"], "completions": programs}
        for i in range(2, 6)
    ]
    first, *_ = runs.entries(runs.trained(tmp_path, data=data, rewards=[{"use": "unit_tests"}]))
    assert first["reward/unit_tests/mean"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert first["health/reward_error"] == first["health/reward_missing"] == 0


def test_a_source_can_be_copied_and_sent_after_it_was_used():
    source, given = UnitTests(), rollouts([SQUARE], columns={"tests": [TESTS]})
    before = source(given)
    assert copy.deepcopy(source)(given) == pickle.loads(pickle.dumps(source))(given) == before == [0.75]


def test_it_works_in_any_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(scores([SQUARE] * 2, [TESTS] * 2)))
    begin = time.monotonic()
    thread.start()
    thread.join()
    assert found == [0.75, 0.75]
    assert time.monotonic() - begin < scaled(20)
