"""Programs in completions, and tests in a dataset's column as questions and expected answers."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from .backend import Answer, Question
from .values import equal_text, equal_value

FORMS = '{"call": EXPRESSION, "expected": VALUE}, {"stdin": TEXT, "stdout": TEXT}, or the text "assert EXPRESSION == LITERAL"'
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
PYTHON = ("", "python", "py", "python3")


@dataclass(frozen=True)
class Case:
    """A test: a question and its expected answer."""

    question: Question
    expected: Any
    json_types: bool

    def passed(self, answer: Answer, tolerance: float) -> bool:
        if answer.kind == "value" and self.question.kind == "call":
            return equal_value(answer.text, self.expected, tolerance, json_types=self.json_types)
        return answer.kind == "stdout" and self.question.kind == "stdin" and equal_text(answer.text, self.expected)


def program_of(completion: str, without_fence: str = "whole") -> str | None:
    """Return the last code block in Python or without a language, else the last one of any language.

    An unclosed block ends with the completion. Without a block returns the whole text, or None (`without_fence`).
    """
    blocks = _blocks(completion)
    chosen = [body for language, body in blocks if language.lower() in PYTHON] or [body for _, body in blocks]
    text = chosen[-1] if chosen else completion if without_fence == "whole" else ""
    return text if text.strip() else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, body) of each code block."""
    found: list[tuple[str, str]] = []
    fence, language, body = "", "", [""]
    for line in text.split("\n"):
        if not fence:
            opened = FENCE.match(line)
            said = line[opened.end() :].split() if opened else []
            if opened and not (opened[1][0] == "`" and any("`" in word for word in said)):
                fence, language, body = opened[1], said[0] if said else "", []
        elif line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            found.append((language, "\n".join(body)))
            fence = ""
        else:
            body.append(line)
    return [*found, (language, "\n".join(body))] if fence else found


def cases_of(value: Any, place: str) -> list[Case]:
    """Parse the tests of a row, a list or its JSON. `place` names the row. Raises `ValueError`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} must be a list of {FORMS}, got text that is not JSON ({error})") from None
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"{place} must be a list of {FORMS}, got {type(value).__name__} {value!r:.80}")
    return [_case(test, f"{place}[{index}]") for index, test in enumerate(value)]


def _case(test: Any, place: str) -> Case:
    if isinstance(test, str):
        return _from_assert(test, place)
    if isinstance(test, dict):
        given = {name for name, value in test.items() if value is not None}
        if "call" in given and given <= {"call", "expected"} and "expected" in test:
            call = test["call"]
            _parsed(call, "eval", place)
            return Case(Question("call", call), test["expected"], json_types=True)
        if given == {"stdin", "stdout"} and all(isinstance(test[name], str) for name in given):
            return Case(Question("stdin", test["stdin"]), test["stdout"], json_types=False)
    raise ValueError(f"{place}: each test must be {FORMS}, got {test!r:.200}")


def _from_assert(text: str, place: str) -> Case:
    """Split an assert into its expression, the only part that is run, and its literal."""
    match _parsed(text, "exec", place):
        case ast.Module(body=[ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]))]):
            try:
                return Case(Question("call", ast.unparse(left)), ast.literal_eval(right), json_types=False)
            except (ValueError, TypeError, RecursionError):
                why = f"{ast.unparse(right)!r:.80} is not a literal"
        case ast.Module(body=[ast.Assert()]):
            why = "it has no comparison with =="
        case _:
            why = "it is not a single assert"
    raise ValueError(
        f"{place}: tests must be `assert EXPRESSION == LITERAL`, to be compared outside of the sandbox, got {text!r:.200}: "
        f"{why}. Rewrite it (... == True, sorted(...) == [...], round(...) == 0.5 and so on)"
    )


def _parsed(text: Any, mode: str, place: str) -> ast.AST:
    try:
        if not isinstance(text, str):
            raise TypeError("expected a string")
        return ast.parse(text, mode=mode)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{place} must be Python, got {text!r:.200}: {error}") from None
