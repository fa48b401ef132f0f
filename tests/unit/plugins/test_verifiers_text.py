"""Rule-based rewards on form: regex, format, json_schema, repetition, language."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hf_rlhf.batch import TokenScores
from hf_rlhf_plugins.rewards.format import Format
from hf_rlhf_plugins.rewards.json_schema import JsonSchema
from hf_rlhf_plugins.rewards.language import Language
from hf_rlhf_plugins.rewards.regex import Regex
from hf_rlhf_plugins.rewards.repetition import Repetition
from tests.helpers.verifiers import HOSTILE, deadline, rows

# regex


@pytest.mark.proves("rewards.regex", how="closed form", tolerance="exact")
def test_regex_matches_where_its_method_says():
    batch = rows(["ab", "xab", "abx", "x"])
    assert Regex(pattern="ab")(batch) == [1.0, 1.0, 1.0, 0.0]
    assert Regex(pattern="ab", method="match")(batch) == [1.0, 0.0, 1.0, 0.0]
    assert Regex(pattern="ab", method="fullmatch")(batch) == [1.0, 0.0, 0.0, 0.0]
    assert Regex(pattern="(?i)AB")(batch) == [1.0, 1.0, 1.0, 0.0]


def test_regex_gives_the_share_of_the_matches_asked_for():
    assert Regex(pattern="a", count=4)(rows(["", "a", "aa b a", "aaaaaa"])) == [0.0, 0.25, 0.75, 1.0]


def test_regex_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"pattern must be a regular expression, got '\('"):
        Regex(pattern="(")
    with pytest.raises(ValueError, match="Use method=search"):
        Regex(pattern="a", method="match", count=2)


@pytest.mark.parametrize("source", [Regex(pattern="(a|aa)+$", timeout=0.2), Format(pattern="(a|aa)+", timeout=0.2)])
def test_a_match_that_takes_too_long_is_given_up(source):
    with deadline(10), pytest.raises(TimeoutError):
        source(rows(["a" * 60 + "!"]))


# format


@pytest.mark.proves("rewards.format", how="exact enumeration", tolerance="exact")
def test_tags_open_and_close_once_in_order_with_nothing_around():
    tags = Format(tags=("think", "answer"))
    right = ["<think>a\n</think> \n<answer>b</answer>", "\n<think></think><answer><b></answer>\n"]
    wrong = [
        "<answer>b</answer><think>a</think>",
        "<think>a</think>",
        "<think>a</think>x<answer>b</answer>",
        "x<think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer>x",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think><answer>b</answer></think>",
        "<think>a<think></think><answer>b</answer>",
        "<think>a</think><answer>b",
        "",
    ]
    assert tags(rows(right)) == [1.0] * len(right)
    assert tags(rows(wrong)) == [0.0] * len(wrong)


def test_one_filled_box_is_asked_for():
    boxes = rows([r"so \boxed{1}", r"\boxed{}", r"\boxed{1} \boxed{1}", r"\boxed{1", "1"])
    assert Format(boxed=True)(boxes) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_every_demand_that_is_set_counts():
    both = Format(tags=("a",), boxed=True, pattern=r".*\}</a>")
    assert both(rows([r"<a>\boxed{1}</a>", r"<a>\boxed{1} </a>", r"\boxed{1}", "<a>1</a>"])) == [1.0, 0.0, 0.0, 0.0]


def test_format_refuses_equal_tags():
    with pytest.raises(ValueError, match="must be distinct"):
        Format(tags=("a", "a"))


# json_schema

PERSON = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


@pytest.mark.proves("rewards.json_schema", how="closed form", tolerance="exact")
def test_json_is_one_where_it_meets_the_schema():
    completions = [
        '{"age": 3}',
        '{"age": -3}',
        '```json\n{"age": "x"}\n```\nno:\n```json\n{"age": 3}\n```',
        '```python\nprint()\n```\n```\n{"age": 3}\n```',
        '{"age": 3} as asked',
        '{"age": NaN}',
        "[" * 100_000,
        "",
    ]
    expected = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert JsonSchema(schema=PERSON)(rows(completions)) == expected
    partly = [1.0, 0.3, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert JsonSchema(schema=PERSON, partial=0.3)(rows(completions)) == partly


def test_schemas_come_from_a_column_as_objects_or_text():
    schemas = [PERSON, json.dumps(PERSON), None, {"type": "array"}]
    assert JsonSchema(column="schema")(rows(['{"age": 3}'] * 4, schema=schemas)) == [1.0, 1.0, None, 0.0]
    assert JsonSchema(column="schema").columns() == {"schema"}


def test_equal_json_votes_alike():
    schema = JsonSchema(schema={})
    assert schema.answer('{"b": 1, "a": [2]}') == schema.answer('```json\n{"a":[2],"b":1}\n```') == '{"a":[2],"b":1}'
    assert schema.answer("no") is None


def test_json_schema_refuses_what_is_no_schema():
    with pytest.raises(ValueError, match=r"must be a JSON schema: 'number!' is not valid.*\$\.properties\.age\.type"):
        JsonSchema(schema={"properties": {"age": {"type": "number!"}}})
    with pytest.raises(ValueError, match="exactly one of schema"):
        JsonSchema()


def test_a_schema_cannot_make_it_fetch_anything():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        schema = {"$ref": f"http://127.0.0.1:{server.server_port}/x.json"}
        with pytest.raises(Exception, match="Unresolvable"):
            JsonSchema(schema=schema)(rows(["1"]))
        server.shutdown()
    assert asked == []


# repetition


@pytest.mark.proves("rewards.repetition", how="closed form", tolerance="exact")
def test_repetition_is_the_share_of_repeated_ngrams():
    batch = rows(["a b a b A b", "a b c d", "a", ""])
    assert Repetition(unit="words", ngram_size=2)(batch) == [2 / 5 - 1, 0.0, 0.0, 0.0]


@pytest.mark.proves("rewards.repetition", how="parity", tolerance="exact")
def test_repetition_of_tokens_is_that_of_trl():
    from trl.rewards import get_repetition_penalty_reward

    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2], [1, 2, 3, 1, 2, 3, 1], []]
    for size in (1, 2, 3):
        expected = get_repetition_penalty_reward(ngram_size=size)(ids)
        assert Repetition(ngram_size=size)(rows([""] * 5, ids=ids)) == pytest.approx(expected, abs=1e-15)


def test_tokens_of_tools_make_no_ngrams():
    batch = rows([""], ids=[[7, 1, 7, 2, 7]], masks=[[1, 0, 1, 0, 1]])
    assert Repetition(ngram_size=2)(batch) == [1 / 2 - 1]
    assert Repetition(ngram_size=2, level="token")(batch) == [TokenScores([0.0, 0.0, -1.0, 0.0, -1.0])]


@pytest.mark.proves("rewards.repetition", how="closed form", tolerance="exact")
def test_by_token_the_penalty_is_on_the_later_ngrams():
    batch = rows([""] * 2, ids=[[1, 2, 3, 1, 2, 4], [5, 5, 5, 6]])
    expected = [TokenScores([0.0, 0.0, 0.0, -1.0, -1.0, 0.0]), TokenScores([0.0, -1.0, -1.0, 0.0])]
    assert Repetition(ngram_size=2, level="token")(batch) == expected


def test_words_have_no_tokens_to_punish():
    with pytest.raises(ValueError, match="Set unit=tokens"):
        Repetition(unit="words", level="token")


# language

ENGLISH = "The quick brown fox jumps over the lazy dog, and nobody minds."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, und niemand stört sich daran."


@pytest.mark.proves("rewards.language", how="closed form", tolerance="exact")
def test_the_share_of_lines_counts_letters():
    mixed = f"{ENGLISH}\n{GERMAN}\n12 + 3\n"
    letters = [sum(map(str.isalpha, line)) for line in (ENGLISH, GERMAN)]
    scores = Language(language="de", languages=("en",), measure="share")(rows([mixed, GERMAN, ENGLISH]))
    assert scores == [letters[1] / sum(letters), 1.0, 0.0]


@pytest.mark.proves("rewards.language", how="invariance", tolerance="1e-6")
def test_probabilities_of_the_candidates_sum_to_one():
    batch = rows([ENGLISH, GERMAN, ENGLISH.upper()])
    by_language = [Language(language=code, languages=("en", "de", "fr"))(batch) for code in ("en", "de", "fr")]
    assert [sum(scores) for scores in zip(*by_language, strict=True)] == pytest.approx([1.0] * 3, abs=1e-6)
    assert by_language[0][0] > 0.9
    assert by_language[1][1] > 0.9
    assert by_language[0][2] > 0.9


def test_what_is_no_prose_has_no_language():
    silent = ["42", "", "```\nder die das\n```", r"\(x + y\) $z$ `code`", "https://example.org"]
    assert Language(language="en")(rows(silent)) == [None] * 5
    mixed = rows([ENGLISH + "\n```\nwenn und aber oder nicht\n```", ENGLISH])
    with_code, without = Language(language="en", languages=("de",))(mixed)
    assert with_code == pytest.approx(without, abs=1e-3)


def test_languages_come_from_a_column():
    source = Language(column="code", languages=("en", "de"), measure="share")
    assert source(rows([GERMAN] * 3, code=["de", "en", None])) == [1.0, 0.0, None]
    assert source.columns() == {"code"}
    with pytest.raises(ValueError, match="must hold languages that py3langid knows, such as en, got 'xx'"):
        source(rows([GERMAN], code=["xx"]))


def test_language_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown languages: klingon"):
        Language(language="klingon")
    with pytest.raises(ValueError, match="exactly one of language"):
        Language()


# All of them

SOURCES = [
    Regex(pattern="a+b"),
    Format(),
    Format(tags=("think",), boxed=True),
    JsonSchema(schema=PERSON),
    Repetition(unit="words"),
    Language(language="en", measure="share"),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_take_no_time(source, text):
    with deadline(5):
        source(rows([text]))
