"""constraints: each instruction of IFEval on texts that follow it and texts that do not."""

from __future__ import annotations

import json

import pytest

from hf_rlhf_plugins.rewards._instructions import CHECKS, instruction
from hf_rlhf_plugins.rewards._sentences import count_sentences
from hf_rlhf_plugins.rewards.constraints import Constraints
from tests.helpers.verifiers import HOSTILE, deadline, rows

LEAST, LESS = "at least", "less than"
ENGLISH = "the quick brown fox jumps over the lazy dog and nobody minds that at all"
CASES: list[tuple[str, dict, list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["fox", "dog"]}, ["A Fox, dogs"], ["a fox", ""]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": LEAST}, ["War, warm"], ["war"]),
    ("keywords:frequency", {"keyword": "a.b", "frequency": 1, "relation": LESS}, ["axb"], ["a.b"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock", "c++"]}, ["rocks"], ["to ROCK on", "in C++."]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": LEAST}, ["##a"], ["#"]),
    ("keywords:letter_frequency", {"letter": "t", "let_frequency": 2, "let_relation": LESS}, ["Two"], ["Tot"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LEAST}, ["it's 2"], ["one two", "- - -"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["one two"], ["a, b, c"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LEAST}, ["Hi. Ho!"], ["Dr. Ho."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, ["At 3.5 p.m. it"], ["A? B"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a***b***"],
        ["a", "a\n***\n***b"],
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, ["a\n\nb"], ["a***b"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        ["a\n\nSo, b", 'a\n\n"so" b'],
        ["so\n\na", "a\n\nsolo", "so", "a\n\nso\n\nb"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b"[:-2] + "[b]"], ["[a]", "[a\n] [b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\nP. S. b", "p.s."], ["PS b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a P.P.S b"], ["P.S. b"]),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, ["n.b. b"], ["NxBx"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n  - b\nc"],
        ["* a", "**a**\n* b", "* a\n* b\n-"],
    ),
    ("detectable_format:constrained_response", {}, ["So: My answer is no."], ["my answer is no", "No."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* *b*"], ["*a*", "* * *a*"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection2"],
        ["Section 1\nSECTION 2", "Sections"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```", "```\n1\n```"], ["a", "{'a': 1}"]),
    ("detectable_format:title", {}, ["<<a b>>\nc"], ["<<a\nb>>", "<< >>", "<<>>", "<a>"]),
    ("combination:two_responses", {}, ["a******b", "******a******b******"], ["a******a", "a", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say A."}, [" say a. A"], ["A. Say A."]),
    ("multi-turn:constrained_start", {"starter": "I think"}, ["I think so", "Hm.\n I think"], ["So I think"]),
    ("startend:end_checker", {"end_phrase": "Bye. "}, ["a BYE.", '"a bye."'], ["bye. a"]),
    ("startend:quotation", {}, [' "a" '], ['"a', '"']),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": LEAST}, ["I AM-OK"], ["I am"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": LESS}, ["no Caps"], ["OK"]),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, "DER SCHNELLE BRAUNE FUCHS SPRINGT UND LACHT"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.title(), "der schnelle braune fuchs springt und lacht"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    ("language:response_language", {"language": "kn"}, ["ಇದು ಕನ್ನಡ ಭಾಷೆ", "42"], [ENGLISH]),
]


def test_every_instruction_has_a_case():
    assert {name for name, *_ in CASES} == set(CHECKS)


@pytest.mark.proves("rewards.constraints", how="exact enumeration", tolerance="exact")
@pytest.mark.parametrize(
    ("name", "arguments", "right", "wrong"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_an_instruction_is_followed_or_not(name, arguments, right, wrong):
    batch = rows(
        [*right, *wrong], instruction_id_list=[[name]] * len(right + wrong), kwargs=[[arguments]] * len(right + wrong)
    )
    assert Constraints()(batch) == [1.0] * len(right) + [0.0] * len(wrong)


@pytest.mark.proves("rewards.constraints", how="closed form", tolerance="exact")
def test_the_share_of_instructions_or_all_of_them():
    ids, kwargs = ["punctuation:no_comma", "startend:quotation", "keywords:existence"], [{}, None, {"keywords": ["a"]}]
    texts = ['"a"', "a", ",", " "]
    batch = rows(texts, instruction_id_list=[ids] * 4, kwargs=[kwargs] * 4)
    assert Constraints()(batch) == [1.0, 2 / 3, 0.0, 0.0]
    assert Constraints(score="all")(batch) == [1.0, 0.0, 0.0, 0.0]


def test_rows_come_as_lists_as_text_or_not_at_all():
    ids, kwargs = ["length_constraints:number_words"], [{"num_words": 2, "relation": LEAST, "num_bullets": None}]
    batch = rows(
        ["a b"] * 4, instruction_id_list=[ids, json.dumps(ids), None, []], kwargs=[kwargs, json.dumps(kwargs), None, []]
    )
    assert Constraints()(batch) == [1.0, 1.0, None, None]
    assert Constraints().columns() == {"instruction_id_list", "kwargs"}
    renamed = Constraints(column="asked", kwargs_column="details")
    assert renamed(rows(["a"], asked=[ids], details=[kwargs])) == [0.0]


def test_instructions_can_be_the_same_for_all_rows():
    source = Constraints(instructions=[{"id": "startend:end_checker", "end_phrase": "Bye"}])
    assert source(rows(["Good bye", "Hello"])) == [1.0, 0.0]
    assert source.columns() == set()


def test_loosely_lines_around_and_asterisks_do_not_matter():
    asked = [{"id": "startend:end_checker", "end_phrase": "bye."}]
    texts = ["Sure:\nbye.", "bye.\nAnything else?", "a\nbye.\nb", "**bye.**", "Sure:\n*bye.*\nb", "bye. a", "\n"]
    assert Constraints(instructions=asked)(rows(texts)) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert Constraints(instructions=asked, mode="loose")(rows(texts)) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("punctuation:no_coma", {}, "Did you mean 'punctuation:no_comma'"),
        ("keywords:frequency", {"keyword": "a"}, "missing a required argument.*it takes: keyword, frequency, relation"),
        ("punctuation:no_comma", {"num_words": 1}, "unexpected keyword.*it takes: nothing"),
        ("length_constraints:number_words", {"num_words": 1, "relation": "most"}, "must be 'less than' or 'at least'"),
    ],
)
def test_wrong_instructions_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        instruction(name, arguments)
    with pytest.raises(ValueError, match=message):
        Constraints(instructions=[{"id": name, **arguments}])


def test_ids_and_arguments_must_be_as_many():
    with pytest.raises(ValueError, match=r"each of 1 instructions .* got 0 sets"):
        Constraints()(rows(["a"], instruction_id_list=[["punctuation:no_comma"]], kwargs=[[]]))
    with pytest.raises(ValueError, match="must each have an id"):
        Constraints(instructions=[{"name": "punctuation:no_comma"}])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no end", 1),
        ("One. Two! Three?", 3),
        ("Mr. A. B. Smith came at 5 p.m. on Jan. 3, i.e. late.", 1),
        ('He said: "Go." She went.', 2),
        ("Pi is 3.14. Is it?", 2),
        ("Well... maybe. Hm... Yes.", 3),
        ("v1.2.3 is out", 1),
    ],
)
def test_sentences_are_counted_by_rule(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_take_no_time(text):
    every = Constraints(instructions=[{"id": name, **arguments} for name, arguments, *_ in CASES], mode="loose")
    with deadline(10):
        every(rows([text]))
