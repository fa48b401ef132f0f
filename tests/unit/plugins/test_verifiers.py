"""Rule-based verifiers of final answers: numeric, choice, exact_match."""

from __future__ import annotations

from fractions import Fraction

import pytest

from hf_rlhf_plugins.rewards._answers import after, boxed
from hf_rlhf_plugins.rewards._numbers import reader
from hf_rlhf_plugins.rewards.choice import Choice
from hf_rlhf_plugins.rewards.exact_match import ExactMatch
from hf_rlhf_plugins.rewards.numeric import Numeric
from tests.helpers.verifiers import HOSTILE, deadline, graded, rows, scored

# Where the answer stands


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        ("5", None),
    ],
)
def test_a_box_holds_what_its_braces_enclose(text, inside):
    assert boxed(text) == inside


def test_the_answer_follows_the_last_marker():
    assert after("#### 1 #### 2", "####") == " 2"
    assert after("2", "####") is None
    assert after("2", None) is None


# numeric


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 km", "5"),
        ("$5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("−5", "-5"),
        (r"\$1,450,000.", "1450000"),
        ("1{,}000", "1000"),
        ("1\u202f000", "1000"),
        ("1'000", "1000"),
        (".5", "1/2"),
        ("0.10", "1/10"),
        ("3/4", "3/4"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"\frac{-3}{4}", "-3/4"),
        (r"\frac34", "3/4"),
        ("1 1/2", "3/2"),
        (r"2\frac{1}{3}", "7/3"),
        ("3e-2", "3/100"),
        ("3.2 × 10^5", "320000"),
        (r"3\times 10^{-4}", "3/10000"),
        ("2^{10}", "1024"),
        ("9 m^2", "9"),
        ("**5** 6", "6"),
        ("16 - 3", "3"),
        ("5-3", "3"),
        ("12/05/2020", "2020"),
        ("the 5th", "5"),
        ("6,250.", "6250"),
        ("H2O", None),
        ("x_2", None),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 500, None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_is_read_as_it_is_written(text, number):
    assert reader(".", False).last(text) == (None if number is None else Fraction(number))


def test_a_decimal_comma_leaves_the_point_to_thousands():
    german = reader(",", False)
    assert german.last("1.234,5") == Fraction("1234.5")
    assert german.last("1.000") == 1000
    assert german.last("3,14") == Fraction("3.14")


@pytest.mark.proves("rewards.numeric", how="closed form", tolerance="exact")
def test_numeric_compares_exactly_without_tolerances():
    completions = ["so 18.0", "it is $18 now", "36/2", "17.999999999", "eighteen", ""]
    assert Numeric()(rows(completions, answer=["18"] * 6)) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    exact = rows(["9007199254740993", "0.1"], answer=["9007199254740992", "1/10"])
    assert Numeric()(exact) == [0.0, 1.0]


def test_references_are_numbers_or_texts_and_may_be_missing(caplog):
    references = [18, 18.0, "18 eggs", "9 * 2 = 18\n#### 18", None, float("nan"), "many"]
    batch = rows(["18"] * 7, answer=references)
    assert Numeric(answer_after="####")(batch) == [1.0, 1.0, 1.0, 1.0, None, None, None]
    assert "column answer is 'many': it must contain a number" in caplog.text


def test_a_reference_that_cannot_be_used_is_warned_of_once(caplog):
    for _ in range(3):
        Numeric()(rows(["1"], answer=["so few"]))
    assert caplog.text.count("so few") == 1


def test_marker_and_box_come_before_the_last_number():
    texts = [r"#### 18 in 3 days", r"\boxed{18} of 20", "18, no 3", r"\boxed{2 + 16}"]
    batch = rows(texts, answer=["18"] * 4)
    assert Numeric(answer_after="####")(batch) == [1.0, 1.0, 0.0, 0.0]
    strict = Numeric(answer_after="####", strict=True)
    assert strict(rows(["18", "#### 18", r"\boxed{18}"], answer=["18"] * 3)) == [0.0, 1.0, 1.0]


def test_tolerances_are_inclusive_and_relative_to_the_reference():
    batch = rows(["9.9", "10.1", "10.2", "-10"], answer=[10] * 4)
    assert Numeric(abs_tol=0.1)(batch) == [1.0, 1.0, 0.0, 0.0]
    assert Numeric(rel_tol=0.02)(batch) == [1.0, 1.0, 1.0, 0.0]


def test_percentages_are_numbers_or_fractions():
    batch = rows(["50%", "0.5", r"50\%"], answer=["50", "50%", "50 percent"])
    assert Numeric()(batch) == [1.0, 0.0, 1.0]
    assert Numeric(percent="fraction")(batch) == [0.0, 1.0, 1.0]


def test_equal_numbers_vote_alike():
    assert Numeric().answer("it is 18.0") == Numeric().answer("$18") == "18"
    assert Numeric().answer("none") is None


@pytest.mark.proves("rewards.numeric", how="parity", tolerance="exact")
@pytest.mark.parametrize("settings", [{"answer_after": "A:"}, {}], ids=["marker", "last number"])
def test_numeric_agrees_with_graded_solutions_of_gsm8k(gsm8k, settings):
    batch, correct = graded(gsm8k)
    assert len(correct) == 50
    assert scored(Numeric(**settings), batch) == correct


# choice


@pytest.mark.proves("rewards.choice", how="closed form", tolerance="exact")
@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B) Paris", "B"),
        ("**B**", "B"),
        ("B\n\nBecause it is.", "B"),
        ("The answer is C", "C"),
        ("the answer is (c).", "C"),
        ("Answer: **D**", "D"),
        ("Option B is correct", "B"),
        ("The answer is A because I say so", "A"),
        ("Answer is C. No wait, the answer is D.", "D"),
        (r"The answer is B? $\boxed{\text{C}}$", "C"),
        ("First (A), then (B).", "B"),
        ("The answer is a tree.", None),
        ("A good answer is hard", None),
        ("A cat is an animal", None),
        ("ABCD", None),
        ("", None),
    ],
)
def test_a_pick_is_a_label_where_one_is_due(text, label):
    assert Choice().answer(text) == label
    expected = [1.0 if label == "B" else 0.0]
    assert Choice()(rows([text], answer=["B"])) == expected


def test_the_right_choice_is_named_by_label_place_or_text(caplog):
    choices = [["Rome", "Paris"]] * 6
    batch = rows(["B"] * 6, answer=["B", "(b)", 1, "1", "paris", "London"], choices=choices)
    assert Choice(choices="choices")(batch) == [1.0, 1.0, 1.0, 1.0, 1.0, None]
    assert "must name one of A, B" in caplog.text
    assert Choice()(rows(["B"], answer=[None])) == [None]


def test_choices_give_labels_and_count_as_picks_by_their_text():
    arc = {"label": ["1", "2"], "text": ["the Moon", "the Sun"]}
    completions = ["2", "It is the Sun, of course", "The Sun", "the Moon or the Sun", "1"]
    batch = rows(completions, answer=["2"] * 5, choices=[arc] * 5)
    assert Choice(choices="choices")(batch) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_choice_settings():
    assert Choice(labels="XY").answer("the answer is Y") == "Y"
    assert Choice(answer_after="=>").answer("(A) => B") == "B"
    with pytest.raises(ValueError, match="must be distinct characters"):
        Choice(labels="AaB")
    with pytest.raises(ValueError, match="must cover the 3 choices, got 2"):
        Choice(labels="AB", choices="choices")(rows(["A"], answer=["A"], choices=[["x", "y", "z"]]))


# exact_match


def test_any_of_several_references_will_do():
    batch = rows(["Paris", "Rome", "Rome"], answer=[["paris", "Paris "], ["Paris"], []])
    assert ExactMatch()(batch) == [1.0, 0.0, None]


# All of them


@pytest.mark.parametrize("verifier", [Numeric(), Choice(), ExactMatch()], ids=lambda v: v.name)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_take_no_time(verifier, text):
    with deadline(5):
        verifier(rows([text], answer=["A"]))
        verifier.answer(text)
