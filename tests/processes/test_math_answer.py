"""math_answer: values and not spellings, and nothing that a completion says can hold up the run."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest

from hf_rlhf.scoring.scorer import Scorer
from hf_rlhf_plugins.rewards.math_answer import MathAnswer
from tests.helpers.verifiers import graded, rows
from tests.helpers.waits import scaled

ABSURD = [r"\boxed{9^{9^{9^9}}}", "9**9**9**9", r"\boxed{9^{9^{9^{9}}}+1}", r"\boxed{(10^9)!}"]
"""Numbers that no computer can write down."""
BRACKETS = ["(" * 100_000, "[" * 50_000 + "]" * 50_000]


@contextmanager
def asking(**settings):
    """batch -> what the core makes of it, rows in processes; all rows may fail."""
    with Scorer([("math", MathAnswer(failure_budget=1.0, **settings))]) as scorer:
        yield lambda batch: scorer.ask(batch)["math"]


def known(answers):
    return [None if x != x else x for x in answers]


@pytest.mark.proves("rewards.math_answer", how="closed form", tolerance="exact")
def test_it_compares_values_and_not_spellings():
    completions = [
        r"so \boxed{\frac{1}{2}}",
        "The answer is 0.5",
        "I say 1/2.",
        r"\boxed{2}",
        "no idea",
        r"\boxed{x+1}",
    ]
    assert MathAnswer()(rows(completions, answer=["0.5"] * 6)) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    equal = [r"\boxed{1+x}", r"$\boxed{(-\infty, 2]}$", r"\boxed{\{2, 1\}}"]
    assert MathAnswer()(rows(equal, answer=["$x+1$", r"$(-\infty, 2]$", r"$\{1,2\}$"])) == [1.0, 1.0, 1.0]


def test_a_reference_that_is_missing_or_no_mathematics_gives_no_score(caplog):
    assert MathAnswer()(rows(["18"] * 3, answer=[None, 18, "what?"])) == [None, 1.0, None]
    assert "column answer is 'what?': it cannot be parsed" in caplog.text


def test_completion_and_reference_are_read_after_the_marker():
    marked = MathAnswer(answer_after="####")
    completions = ["\\boxed{17} #### 18 eggs\nThen", "18", "#### 18\n", "#### 17"]
    references = ["9*2=<<9*2=18>>18\n#### 18", "#### 1,018", "18", "#### 18"]
    assert marked(rows(completions, answer=references)) == [1.0, 0.0, 1.0, 0.0]
    assert MathAnswer()(rows(completions[:1], answer=["18"])) == [0.0]


def test_equal_answers_vote_alike():
    assert MathAnswer().answer(r"thus \boxed{18}") == MathAnswer().answer("it is 18") == "18"
    assert MathAnswer().answer("no idea") is None


def test_it_says_which_column_it_reads_and_where_it_runs():
    source = MathAnswer(column="truth")
    assert source.columns() == {"truth"}
    assert (source.workers, source.timeout, source.on_error) == ("processes", 5.0, "none")
    assert source.memory_mib == 4096


def test_absurd_numbers_end_at_the_time_limit_off_the_main_thread_too():
    with asking(timeout=2.0, num_workers=2) as ask:
        assert known(ask(rows(["1", "2"], answer=["1", "1"])).answers) == [1.0, 0.0]
        found = []
        thread = threading.Thread(target=lambda: found.append(ask(rows([*ABSURD, "1"], answer=["1"] * 5))))
        started = time.monotonic()
        thread.start()
        thread.join()
        assert time.monotonic() - started < scaled(60)
        assert known(found[0].answers)[-1] == 1.0
        for row, failure in enumerate(found[0].failures):
            assert failure.kind == "timeout", (row, failure)
        assert all(answer in (None, 0.0) for answer in known(found[0].answers)[:4])
        assert len(found[0].failures) >= 2


def test_deep_brackets_are_no_answer():
    with asking(num_workers=1) as ask:
        found = ask(rows([*BRACKETS, r"\boxed{18}"], answer=["18"] * 3))
    assert all(answer in (None, 0.0) for answer in known(found.answers)[:2])
    assert known(found.answers)[2] == 1.0


def test_answers_of_absurd_completions_end_at_the_time_limit():
    with Scorer([("math", MathAnswer(timeout=2.0, num_workers=2))]) as scorer:
        answers = scorer.final_answers("math", [ABSURD[0], "it is 18", "no idea"])
    assert answers[1:] == ["18", None]


def test_odd_text_reaches_the_process_whole():
    with asking(num_workers=1) as ask:
        assert known(ask(rows(["é\n\r\u2028 1", "", "\0"], answer=["1"] * 3)).answers) == [1.0, 0.0, 0.0]


@pytest.mark.proves("rewards.math_answer", how="parity", tolerance="exact")
def test_it_agrees_with_graded_solutions_of_gsm8k(gsm8k):
    batch, correct = graded(gsm8k)
    with asking(answer_after="A:") as ask:
        found = ask(batch)
    wrong = [row for row, (x, y) in enumerate(zip(found.answers, correct, strict=True)) if x != y]
    assert len(correct) == 50
    assert not wrong
