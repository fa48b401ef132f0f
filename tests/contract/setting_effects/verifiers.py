"""Two values of each setting of the rule-based verifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_rlhf import load_plugin
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers.verifiers import rows

MINIMAL: dict[str, dict[str, Any]] = {
    "json_schema": {"schema": {"type": "integer"}},
    "language": {"language": "en"},
    "math_answer": {"workers": "inline"},
    "regex": {"pattern": "[0-9]"},
}
"""What a plugin cannot do without, or what keeps a small test in this process."""

ENGLISH = "The quick brown fox jumps over the lazy dog.\nUnd niemand stört sich daran, dass er es tut."
CHOICES = {"label": ["X", "Y"], "text": ["the Moon", "the Sun"]}
COMMA, QUOTES = {"id": "punctuation:no_comma"}, {"id": "startend:quotation"}


def of_row(
    plugin: str, setting: str, first: Any, second: Any, text: str, columns: dict[str, Any], **others: Any
) -> None:
    """Two values that give one completion different scores; None in `others` takes a minimal setting away."""

    def show(folder: Path, value: Any) -> Any:
        settings = {**MINIMAL.get(plugin, {}), **others, setting: value}
        settings = {key: x for key, x in settings.items() if x is not None}
        batch = rows([text], ids=[[1, 1, 1, 2]], **{name: [x] for name, x in columns.items()})
        (score,) = load_plugin("rewards", plugin, **settings)(batch)
        return score if score is None else getattr(score, "values", score)

    EFFECTS[f"rewards.{plugin}.{setting}"] = SettingEffect(first, second, show)


REFERENCES = {"answer": "5", "other": "7"}
of_row("choice", "column", "answer", "other", "(A)", {"answer": "A", "other": "B"})
of_row("choice", "choices", None, "choices", "the Sun", {"answer": "Y", "choices": CHOICES}, labels="XY")
of_row("choice", "labels", "ABCD", "WXYZ", "W", {"answer": 0})
of_row("choice", "answer_after", None, "=>", "(A) => B (C)", {"answer": "B"})
of_row("choice", "answer_tag", None, "b", "<answer>B</answer> <b>A</b>", {"answer": "B"})
of_row("format", "tags", ("a",), ("b",), "<a>1</a>", {})
of_row("format", "boxed", False, True, "<think>1</think><answer>2</answer>", {})
of_row("json_schema", "schema", {"type": "integer"}, {"type": "string"}, "1", {})
of_row("json_schema", "column", "one", "two", "1", {"one": {"type": "integer"}, "two": {"type": "string"}}, schema=None)
of_row("json_schema", "partial", 0.0, 0.5, '"1"', {})
of_row("language", "language", "en", "de", ENGLISH, {})
of_row("language", "column", "one", "two", ENGLISH, {"one": "en", "two": "de"}, language=None)
of_row("language", "languages", ("de",), ("fr",), ENGLISH, {})
of_row("language", "measure", "probability", "share", ENGLISH, {})
of_row("math_answer", "answer_after", None, "=>", "=> 7\nThe answer is 5", {"answer": "7"})
of_row("math_answer", "answer_tag", None, "b", "<answer>7</answer> <b>5</b>", {"answer": "7"})
of_row("numeric", "column", "answer", "other", "5", REFERENCES)
of_row("numeric", "answer_after", None, "A:", "A: 5, not 7", REFERENCES)
of_row("numeric", "answer_tag", None, "b", "<answer>5</answer> <b>7</b>", REFERENCES)
of_row("numeric", "strict", False, True, "it is 5", REFERENCES)
of_row("numeric", "abs_tol", 0.0, 0.5, "5.5", REFERENCES)
of_row("numeric", "rel_tol", 0.0, 0.1, "5.5", REFERENCES)
of_row("numeric", "decimal_mark", ".", ",", "5.000", REFERENCES)
of_row("numeric", "percent", "number", "fraction", "5%", REFERENCES)
of_row("regex", "pattern", "a", "b", "a", {})
of_row("regex", "method", "search", "fullmatch", "5 ", {})
of_row("regex", "count", 1, 2, "5", {})
of_row("repetition", "ngram_size", 1, 2, "", {})
of_row("repetition", "unit", "tokens", "words", "a b c d", {}, ngram_size=1)
of_row("repetition", "level", "sequence", "token", "", {})
ASKED = {"asked": [COMMA["id"]], "others": [QUOTES["id"]], "with": [{}], "without": []}
of_row("constraints", "column", "asked", "others", "a", ASKED, kwargs_column="with")
of_row(
    "constraints",
    "kwargs_column",
    "one",
    "two",
    "bye",
    {"instruction_id_list": ["startend:end_checker"], "one": [{"end_phrase": "bye"}], "two": [{"end_phrase": "ciao"}]},
)
of_row("constraints", "instructions", [COMMA], [QUOTES], "a", {})
of_row("constraints", "mode", "strict", "loose", 'Sure:\n"a"', {}, instructions=[QUOTES])
of_row("constraints", "score", "share", "all", "a", {}, instructions=[COMMA, QUOTES])
