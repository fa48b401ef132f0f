"""References and completions as datasets and models write them: LaTeX, thoughts, answer tags, GSM8K's `####`, mappings."""

from __future__ import annotations

import json
import re

import pytest

from hf_rlhf.config.recipe import OfflineRecipe, load_recipe
from hf_rlhf.data.prompts import check_columns
from hf_rlhf.data.sources import DatasetError
from hf_rlhf.scoring.lookup import named_rewards
from hf_rlhf.scoring.score_dataset import score as score_rows
from hf_rlhf_plugins.rewards._answers import enclosed, without_thoughts
from hf_rlhf_plugins.rewards.choice import Choice
from hf_rlhf_plugins.rewards.exact_match import ExactMatch
from hf_rlhf_plugins.rewards.math_answer import MathAnswer
from hf_rlhf_plugins.rewards.numeric import Numeric
from tests.helpers.paths import DATA, ROOT
from tests.helpers.verifiers import HOSTILE, deadline, rows


def box(text):
    return rf"So it is $\boxed{{{text}}}$."


def score(source, completion, reference):
    return source(rows([completion], answer=[reference]))[0]


PARTS = r"\\\w*(?:frac|sqrt)(?:\{\d+\})+|\\pi"
WHOLE = {"65", r"\frac{68}{3}"}
"""Parts that are the whole answer, without its unit."""
MATH = [json.loads(line)["answer"] for line in (DATA / "math" / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("reference", MATH)
def test_a_bare_reference_of_math_is_one_expression_and_no_fragment_of_it_counts(reference):
    right = [
        box(reference),
        f"The answer is ${reference}$.",
        f"With $x=2$ we get ${reference}$.",
        rf"\boxed{{1}}? No. \boxed{{{reference}}}",
        f"<think>\\boxed{{1}}</think> <answer>{reference}</answer>",
        f"So\n#### {reference}",
    ]
    assert MathAnswer()(rows(right, answer=[reference] * len(right))) == [1.0] * len(right)
    wrapped = [f"${reference}$", rf"\boxed{{{reference}}}", rf"\({reference}\)"]
    assert MathAnswer()(rows([box(reference)] * 3, answer=wrapped)) == [1.0] * 3
    parts = {*re.findall(r"-?\d+", reference), *re.findall(PARTS, reference), *re.split(r"[-+,]", reference)} - {""}
    wrong = {part.strip() for part in parts} - WHOLE - {reference.strip()}
    wrong = {part for part in wrong if part.count("{") == part.count("}") and "\\text" not in part}
    scores = MathAnswer()(rows([rf"\boxed{{{part}}}" for part in wrong], answer=[reference] * len(wrong)))
    assert scores == [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("reference", "completion", "due"),
    [
        (r"3\sqrt{13}", box(r"3\sqrt{13}"), 1),
        (r"3\sqrt{13}", box("3"), 0),
        (r"\dfrac{9}{7}", box(r"\frac{9}{7}"), 1),
        (r"\left( 3, \frac{\pi}{2} \right)", box(r"\left( 3, \frac{\pi}{2} \right)"), 1),
        (r"10,\!080", box("10080"), 1),
        (r"10,\!080", box("10"), 0),
        (r"(-\infty, 2]", box(r"(-\infty, 2]"), 1),
        ("2x+1", box("1+2x"), 1),
        (r"[0,\infty)", box(r"[0,\infty)"), 1),
        (r"\$32,\!348", box("32348"), 1),
        (r"\text{Monday}", box(r"\text{Monday}"), 1),
        (r"\text{Monday}", box("Monday"), 1),
        (r"\text{Monday}", box(r"\text{Tuesday}"), 0),
        ("Monday", "The answer is **Monday**.", 1),
        ("yes", r"\boxed{\text{Yes}}", 1),
        ("42", box("42"), 1),
        # The last box is the answer
        ("8", r"\boxed{5}. Wait, I forgot to multiply by two. So \boxed{8}", 1),
        ("5", r"\boxed{5}. Wait, I forgot to multiply by two. So \boxed{8}", 0),
        ("4", r"\boxed{35 cm} in all, so \boxed{4}", 1),
        # Units, mixed numbers, percent, bases
        (r"3\sqrt{13} \text{ cm}", box(r"3\sqrt{13}"), 1),
        ("3\\sqrt{13} cm", box("3"), 0),
        ("18 eggs", "She has 18 eggs.", 1),
        (r"\text{5 cm}", box("5"), 1),
        (r"\text{June 20}", box("20"), 0),
        ("2 hours and 30 minutes", box("30"), 0),
        ("2 hours and 30 minutes", box("2 hours and 30 minutes"), 1),
        ("1 1/2", box("1"), 0),
        ("1 1/2", box(r"\frac32"), 1),
        (r"50\%", box("50"), 1),
        ("25_{6}", box("25_6"), 1),
        ("25_{6}", box("25"), 0),
        ("2,3", box("3"), 0),
        ("2,3", box("3, 2"), 1),
        ("pi/2", box(r"\frac{\pi}{2}"), 1),
        ("ln(2)", box(r"\ln 2"), 1),
        (".5", box(r"\frac{1}{2}"), 1),
        ("6", "<answer>`6`</answer>", 1),
        # Thousands
        ("10000", r"\boxed{10{,}000}", 1),
        ("10000", r"\boxed{10\,000}", 1),
        ("10000", r"\boxed{10~000}", 1),
        (r"1{,}234{,}567.5", r"\boxed{1234567.5}", 1),
        # Currency
        ("6", "$2 + $4 = $6", 1),
        ("6", r"\$2 + \$4 = \$6.", 1),
        ("$18", box("18"), 1),
        ("6", "He pays $5 for one and $10 for two, then $x=6$.", 1),
        # Prose around the answer
        ("18.", box("18"), 1),
        ("6", "**Answer: 6**", 1),
        ("6", "The answer is therefore 6.", 1),
        ("6", "She answered 7 and correctly answers 8 of them, 6 are left.", 1),
        ("6", "The total is (6).", 1),
    ],
)
def test_math_answer_reads_what_datasets_and_models_write(reference, completion, due):
    assert score(MathAnswer(), completion, reference) == due


@pytest.mark.parametrize(
    ("reference", "completion", "due"),
    [
        (r"10,\!080", r"There are \boxed{10,\!080} ways.", 1),
        (r"10,\!080", r"There are \boxed{10080} ways.", 1),
        (r"10,\!080", r"There are \boxed{80} ways.", 0),
        ("3110400", r"There are \boxed{3,\!110,\!400} ways.", 1),
        ("1000", r"There are \boxed{1~000} ways.", 1),
        ("1000", r"There are 1\ 000 ways", 1),
        ("18", r"\boxed{18}", 1),
        (r"\$32,\!348", box("32348"), 1),
        (r"\text{18 dollars}", box(r"\text{18}"), 1),
        ("8", r"\boxed{5}. Wait, I forgot to multiply by two. So \boxed{8}", 1),
        ("4", r"\boxed{35 cm} in all, so \boxed{4}", 1),
        ("18", r"\boxed{17 or 18}", 0),
        ("18", "<answer>2 * 9 = 18</answer> 3", 1),
        (r"3\sqrt{13}", r"\boxed{13}", None),
        (r"\frac{\pi}{2}", "2", None),
    ],
)
def test_numeric_reads_what_datasets_and_models_write(reference, completion, due):
    assert score(Numeric(), completion, reference) == due


@pytest.mark.parametrize("verifier", [MathAnswer(), Numeric()], ids=lambda v: v.name)
def test_the_number_after_four_hashes_at_the_end_needs_no_setting(verifier):
    reference = "5 questions * 1 = 5, she answered 51 of them\n#### 41"
    completions = ["#### 41", "5 * 8 = 51\n#### 41", r"\boxed{51} #### 41", "41", "#### 51", "#### Step 1\n41"]
    assert verifier(rows(completions, answer=[reference] * 6)) == [1, 1, 1, 1, 0, 1]
    assert score(verifier, "#### 1,234", "a 7\n#### 1234") == 1


@pytest.mark.parametrize("verifier", [MathAnswer, Numeric, Choice], ids=lambda v: v.name)
def test_with_an_answer_tag_its_content_alone_is_graded(verifier):
    right, wrong = ("B", "C") if verifier is Choice else ("18", "20")
    shown = f"The answer is {right}. \\boxed{{{right}}}"
    completions = [
        f"<think>{shown}</think> <answer>{right}</answer>",
        f"<think>{shown}</think> <answer>{wrong}</answer>",
        f"{shown} <answer>{wrong}</answer> {shown}",
        f"<answer>{wrong}</answer> <answer>\\boxed{{{right}}}</answer>",
        shown,
        f"<think><answer>{right}</answer></think> {shown}",
        f"<answer>{right}",
        "<answer></answer>",
    ]
    batch = rows(completions, answer=[right] * len(completions))
    assert verifier(answer_tag="answer")(batch) == [1, 0, 0, 1, 0, 0, 0, 0]
    assert verifier()(batch.select([0, 1, 2, 3, 4])) == [1, 0, 0, 1, 1]


@pytest.mark.parametrize("verifier", [MathAnswer(), Numeric(), Choice()], ids=lambda v: v.name)
def test_thoughts_are_never_graded(verifier):
    answer = "B" if verifier.name == "choice" else "8"
    other = "C" if verifier.name == "choice" else "7"
    completions = [
        f"<think>{answer}</think>",
        f"<think>The answer is {answer}",
        f"The answer is {answer}</think>{other}",
        f"<think>{answer}</think>{other}",
        f"<think>{other}</think>{answer}",
        f"{other}</think>{answer}",
        f"[THINK]{other}[/THINK]{answer}",
        f"<reasoning>{other}</reasoning>\n{answer}",
    ]
    assert verifier(rows(completions, answer=[answer] * 8)) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_what_is_left_without_thoughts():
    assert without_thoughts("a<think>b</think>c<think>d") == "ac"
    assert without_thoughts("a</think>b") == "b"
    assert without_thoughts("a") == "a"
    assert enclosed("<a>1</a><a>2</a><a>3", "a") == "2"
    assert enclosed("1</a>", "a") is None
    for text in [*HOSTILE, "<think>" * 20_000, "<answer>" * 20_000, "####" * 30_000, "$" * 100_000, "C or " * 20_000]:
        with deadline(5):
            Numeric().answer(text)
            Choice().answer(text)


@pytest.mark.parametrize(
    "text",
    [
        "C or D",
        "The answer is C or D",
        "The answer is either C or D.",
        "The answer is (C) or (D).",
        "The answer is C, or D",
        "(C) or (D)",
        r"\boxed{C \text{ or } D}",
        r"\boxed{C, D}",
        "C/D",
        "Both C and D",
        "**C** or **D**",
        "<answer>C or D</answer>",
    ],
)
def test_several_labels_are_no_pick(text):
    assert Choice().answer(text) is None
    assert Choice()(rows([text, text], answer=["C", "D"])) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Not A or B. The answer is C", "C"),
        ("It could be A or B, so (C).", "C"),
        ("The answer is C, because D is wrong", "C"),
        ("The answer is C; D is wrong", "C"),
        ("A or B? The answer is B.", "B"),
        ("The answer is A, a tree", "A"),
        ("<answer>The answer is B</answer>", "B"),
        ("So\n#### B", "B"),
    ],
)
def test_labels_that_are_ruled_out_leave_the_pick(text, label):
    assert Choice().answer(text) == label


# References inside mappings and lists

VERL = [{"style": "rule", "ground_truth": "72"}, {"style": "rule", "ground_truth": "72"}]


@pytest.mark.parametrize("verifier", [ExactMatch, Numeric, MathAnswer], ids=lambda v: v.name)
def test_a_dotted_column_reads_inside_mappings_and_lists(verifier):
    batch = rows(["72", "71"], reward_model=VERL, answers=[["72", "1"], []])
    assert verifier(column="reward_model.ground_truth")(batch) == [1.0, 0.0]
    assert verifier(column="answers.0")(batch) == [1.0, None]
    assert verifier(column="reward_model.missing")(batch) == [None, None]
    with pytest.raises(KeyError, match="no column 'other'"):
        verifier(column="other")(batch)
    plain = rows(["72"], **{"a.b": ["72"], "a": [{"b": "1"}]})
    assert verifier(column="a.b")(plain) == [1.0]


@pytest.mark.parametrize("verifier", [ExactMatch, Numeric, MathAnswer, Choice], ids=lambda v: v.name)
def test_a_reference_that_is_a_mapping_is_an_error_by_name(verifier):
    said = rf"rewards.{verifier.name}: column 'reward_model' .* mapping .* Set column=reward_model.ground_truth"
    with pytest.raises(ValueError, match=said):
        verifier(column="reward_model")(rows(["72", "71"], reward_model=VERL))


@pytest.mark.parametrize("verifier", [Numeric, MathAnswer, Choice], ids=lambda v: v.name)
def test_a_list_of_references_is_an_error(verifier):
    with pytest.raises(ValueError, match=r"must hold one answer per row, got a list\. Set column=answer\.0"):
        verifier()(rows(["72"], answer=[["72"]]))


def test_a_nested_reference_passes_the_check_of_columns_and_is_scored(tmp_path):
    check_columns({"prompt", "reward_model"}, [Numeric(column="reward_model.ground_truth")])
    with pytest.raises(DatasetError, match=r"rewards\.numeric reads reward\.ground_truth"):
        check_columns({"prompt", "reward_model"}, [Numeric(column="reward.ground_truth")])
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": "q", "reward_model": VERL[0], "completion": text} for text in ("72", "71")]
    file.write_text("\n".join(map(json.dumps, lines)))
    found = score_rows(named_rewards("numeric", ["column=reward_model.ground_truth"]), str(file))
    assert found.totals["numeric"] == [1.0, 0.0]


# Shipped recipes


def with_verifier():
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        if "stages:" not in path.read_text():
            recipe = load_recipe(path.stem)
            sources = [] if isinstance(recipe, OfflineRecipe) else recipe.plugins.get("rewards", ())
            if any(source.verifier and source.name != "episode" for source in sources):
                yield pytest.param(path.stem, id=path.stem)


@pytest.mark.parametrize("name", with_verifier())
def test_the_rewards_of_a_recipe_tell_right_from_wrong_in_the_format_that_it_asks_for(name):
    sources = {source.name: source for source in load_recipe(name).plugins["rewards"]}
    thought = "16 - 3 - 4 = 9 eggs are left. 9 * 2 = 18 dollars."
    if "format" in sources:
        texts = [f"<think>{thought}</think> <answer>{x}</answer>" for x in ("18", "20")]
        assert sources["format"](rows(texts)) == [1.0, 1.0]
    elif "exact_match" in sources:
        texts = ["18", "20"]
    else:
        texts = [rf"{thought} So \boxed{{{x}}}" for x in ("18", "20")]
    verdicts = [source(rows(texts, answer=["18", "18"])) for source in sources.values() if source.verifier]
    assert verdicts == [[1.0, 0.0]]
