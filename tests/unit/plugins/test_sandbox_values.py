"""Plain values out of a program and against expected ones: what is equal, what is not, and what is no value at all."""

from __future__ import annotations

import ast
import json
import math
import time
from collections import Counter, OrderedDict, defaultdict, namedtuple
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rlhf_plugins.rewards._sandbox.backend import Answer, Limits, Question, new_nonce, packed, unpacked
from hf_rlhf_plugins.rewards._sandbox.cases import cases_of, program_of
from hf_rlhf_plugins.rewards._sandbox.sandbox_child import Job, fields_of, joined
from hf_rlhf_plugins.rewards._sandbox.sandbox_encode import NotPlain, encode
from hf_rlhf_plugins.rewards._sandbox.values import equal_text, equal_value
from tests.helpers.waits import scaled

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary()
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=6)
PLAIN = st.recursive(
    HASHABLE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HASHABLE, inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=12,
)


def same(value: Any, expected: Any, tolerance: float = 0.0, *, json_types: bool = False) -> bool:
    return equal_value(encode(value, 10**6), expected, tolerance, json_types=json_types)


def has_nan(x: Any) -> bool:
    if isinstance(x, dict):
        return any(map(has_nan, [*x, *x.values()]))
    if isinstance(x, list | tuple | set | frozenset):
        return any(map(has_nan, x))
    return isinstance(x, float | complex) and x != x


@settings(max_examples=100, deadline=None)
@given(PLAIN)
def test_every_plain_value_comes_out_as_itself(value):
    json.loads(encode(value, 10**6))
    if not has_nan(value):  # a nan among keys equals nothing
        assert same(value, value)


@settings(max_examples=100, deadline=None)
@given(PLAIN, PLAIN)
def test_two_values_are_equal_where_python_says_so(a, b):
    if not has_nan([a, b]):
        assert same(a, b) == (a == b)


EQUAL = [
    (1, 1.0, True),
    (1, True, True),
    ("1", 1, False),
    (b"a", "a", False),
    ((1, 2), [1, 2], False),
    ([1, 2], (1, 2), False),
    ({1: 2}, {"1": 2}, False),
    ({1, 2}, [1, 2], False),
    ({1, 2}, {2, 1}, True),
    ({1}, {1, 2}, False),
    (frozenset({1}), {1}, True),
    ({"a": [(1, {2})]}, {"a": [(1, {2})]}, True),
    (0.1 + 0.2, 0.3, False),
    (None, 0, False),
    (None, False, False),
    ("", None, False),
    (10**400, 1e300, False),
    (math.inf, 10**400, False),
    (float("nan"), float("nan"), True),
    (float("nan"), 0.0, False),
    (2j, 2j, True),
    (3 + 0j, 3, True),
    ([], {}, False),
    ((), [], False),
]


@pytest.mark.parametrize(("value", "expected", "equal"), EQUAL)
def test_equality_is_pythons(value, expected, equal):
    assert same(value, expected) is equal


def test_floats_are_equal_within_the_tolerance():
    assert same(0.1 + 0.2, 0.3, 1e-9)
    assert same([1e9 + 1], [1e9], 1e-6)
    assert same({"a": (1.0, 1e-8j)}, {"a": (1, 0j)}, 1e-6)
    assert not same(0.31, 0.3, 1e-6)
    assert not same(10**9 + 1, 10**9, 1e-6), "whole numbers are compared exactly"
    assert not same({0.1 + 0.2}, {0.3}, 1e-6), "and so are keys"


def test_a_list_of_json_stands_for_a_tuple_too():
    assert same((1, [2, (3,)]), [1, [2, [3]]], json_types=True)
    assert not same((1, 2), [2, 1], json_types=True)
    assert not same({1, 2}, [1, 2], json_types=True)


class Colour(IntEnum):
    RED = 3


class Other(Enum):
    RED = 3


class Liar(int):
    """Equals everything, and says that it is 7."""

    def __eq__(self, other):
        return True

    __hash__ = int.__hash__

    def __int__(self):
        return 7

    def __index__(self):
        return 7

    def __repr__(self):
        return "7"


class Text(str):
    def __str__(self):
        return "other"


def test_an_instance_of_a_subclass_is_the_plain_value_that_it_holds():
    assert same(Colour.RED, 3)
    assert same(Liar(5), 5)
    assert not same(Liar(5), 7)
    assert same(Text("a"), "a")
    assert same(Counter("aab"), {"a": 2, "b": 1})
    assert same(OrderedDict(b=1), {"b": 1})
    assert same(defaultdict(list, {1: [2]}), {1: [2]})
    assert same(namedtuple("Point", "x y")(1, 2), (1, 2))
    assert same(bytearray(b"ab"), b"ab")


@pytest.mark.parametrize(
    "value", [object(), Other.RED, Decimal(1), iter([]), {}.keys(), range(2), len, {1: [object()]}]
)
def test_other_objects_are_no_plain_values(value):
    with pytest.raises(NotPlain, match="not a plain value"):
        encode(value, 10**6)


def test_size_and_depth_are_bounded_while_a_value_is_written():
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(NotPlain, match="too deep"):
        encode(deep, 10**6)
    wide: Any = [1]
    for _ in range(60):
        wide = [wide, wide]
    begin = time.monotonic()
    with pytest.raises(NotPlain, match="too large"):
        encode(wide, 10**5)
    assert time.monotonic() - begin < scaled(5)
    assert len(encode("x" * 98, 100)) == 100
    with pytest.raises(NotPlain, match="too large"):
        encode("x" * 99, 100)


STRANGE = [
    "",
    "5 5",
    "nul",
    "[" * 100_000,
    '{"t":' * 5000,
    "NaN",
    "Infinity",
    "1" * 5000,
    '{"i":"zz"}',
    '{"i":5}',
    '{"f":"1"}',
    '{"c":[1]}',
    '{"c":[[],1]}',
    '{"b":"0"}',
    '{"d":[[1]]}',
    '{"d":5}',
    '{"d":[5]}',
    '{"s":[[1]]}',
    '{"x":[5]}',
    '{"t":[5],"s":[5]}',
    '{"i":"0x5","more":1}',
    "{}",
    "\ud800",
]
DUE = [5, 5.0, "5", [5], (5,), {5}, {5: 5}, None, True, 5j, b"5", {(5, 5): 5}, frozenset({(5,)})]


@pytest.mark.parametrize("text", STRANGE)
def test_what_no_encoder_wrote_equals_nothing(text):
    assert not any(equal_value(text, expected, 1e-6, json_types=flag) for expected in DUE for flag in (False, True))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ifcbtsdx"), inner, max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(ANY_JSON, PLAIN, st.booleans())
def test_whatever_json_comes_the_answer_is_yes_or_no(given, expected, json_types):
    for due in (expected, *DUE):
        assert equal_value(json.dumps(given), due, 1e-6, json_types=json_types) in (True, False)


def test_keys_that_collide_cost_no_more_than_others():
    modulus = 2**61 - 1
    keys = ",".join(f'{{"i":"{hex(n * modulus)}"}}' for n in range(1, 40_000))
    begin = time.monotonic()
    assert not equal_value(f'{{"s":[{keys}]}}', {1, 2}, 0.0, json_types=False)
    assert not equal_value(f'{{"s":[{keys}]}}', set(range(39_999)), 0.0, json_types=False)
    assert not equal_value(f'{{"s":[{{"s":[{keys}]}}]}}', {frozenset({1})}, 0.0, json_types=False)
    assert time.monotonic() - begin < scaled(10)


def test_doubled_keys_are_no_set_and_no_dict():
    assert not equal_value('{"s":[1,1]}', {1, 2}, 0.0, json_types=False)
    assert not equal_value('{"d":[[1,1],[1,1]]}', {1: 1, 2: 1}, 0.0, json_types=False)


def test_texts_are_equal_but_for_white_space_at_the_ends_of_lines():
    assert equal_text("1 \n2\t\r\n\n\n", "1\n2")
    assert equal_text("", "\n\n")
    assert not equal_text(" 1", "1")
    assert not equal_text("1\n\n2", "1\n2")
    assert not equal_text("1 2", "1  2")


# The wire


@settings(max_examples=50, deadline=None)
@given(st.text(), st.lists(st.tuples(st.sampled_from(["call", "stdin"]), st.text())))
def test_a_job_arrives_as_it_was_sent(code, tests):
    text = packed(code, [Question(kind, text) for kind, text in tests], Limits(seconds=2.5), nonce="n" * 64)
    length = int(text[:12])
    job = Job(fields_of(text[12 : 12 + length]))
    assert text[12 + length :] == b"n" * 64
    assert (job.code, job.seconds, job.user, job.disk) == (code, 2.5, -1, Limits().disk)
    assert job.tests == [(kind[:1].encode(), sent.encode()) for kind, sent in tests]


def test_answers_with_another_nonce_or_number_are_refused():
    questions, nonce = [Question("call", "1")], new_nonce()
    assert unpacked(joined([nonce.encode(), b"v1"]), questions, nonce) == [Answer("value", "1")]
    for fields in ([b"other", b"v1"], [nonce.encode()], [nonce.encode(), b"v1", b"v1"], [b"", b"v1"]):
        with pytest.raises(ValueError, match=r"nonce|one answer per test"):
            unpacked(joined(fields), questions, nonce)
    for text in (b"5:abc", b"x:abc", b"-1:abc", b"3", b":"):
        with pytest.raises(ValueError):
            unpacked(text, questions, nonce)
    assert len({new_nonce() for _ in range(100)}) == 100


# From completions and datasets


FENCED = [
    ("a\n```python\nx = 1\n```\nb", "x = 1"),
    ("```\none\n```\n```py\ntwo\n```\nend", "two"),
    ("```python\none\n```\nIt prints\n```text\n5\n```", "one"),
    ("```c\none\n```\n```java\ntwo\n```", "two"),
    ("~~~python\nx\n```\ny\n~~~", "x\n```\ny"),
    ("````\n```\nx\n```\n````", "```\nx\n```"),
    ("text\n```python\ncut off", "cut off"),
    ("   ```Python title=a\nx\n   ```", "x"),
    ("x = ```1```", "x = ```1```"),
    ("```x` = 1", "```x` = 1"),
    ("x = 1", "x = 1"),
    ("  \n", None),
    ("```\n\n```", None),
]


@pytest.mark.parametrize(("completion", "program"), FENCED)
def test_the_program_is_the_last_fenced_block(completion, program):
    assert program_of(completion) == program


def test_a_long_line_of_fences_takes_no_time():
    begin = time.monotonic()
    for text in ("`" * 10**6, "```" + "a" * 10**6 + "`", "~" * 10**6 + "`", " " * 10**6 + "```", "```\n" * 10**5):
        program_of(text)
    assert time.monotonic() - begin < scaled(10)


def test_only_the_expression_of_an_assert_is_sent():
    (case,) = cases_of(["assert f(1, 'a') == (2, {3: -4}), 'message'"], "row 3")
    assert case.question == Question("call", "f(1, 'a')")
    assert case.expected == (2, {3: -4})
    for literal in ("-1", "1+2j", "set()", "{1, 2}", "None", "True", "b'x'", "(1,)", "{'a': [1.5]}", "''"):
        (case,) = cases_of([f"assert f() == {literal}"], "row")
        assert case.expected == ast.literal_eval(literal)


def test_tests_come_as_a_list_or_as_its_json():
    tests = [{"call": "f(1)", "expected": [1, None]}, {"stdin": "1\n", "stdout": "2\n"}, "assert f(2) == 3"]
    assert cases_of(json.dumps(tests), "row") == cases_of(tests, "row")
    assert [case.question.kind for case in cases_of(tests, "row")] == ["call", "stdin", "call"]
    columns = [{"call": "f()", "expected": None, "stdin": None, "stdout": None}]  # as Arrow fills them up
    assert cases_of(columns, "row")[0].expected is None
    assert cases_of(None, "row") == cases_of("null", "row") == cases_of([], "row") == []


WRONG = [
    ("5", "a list of"),
    ("{", "not JSON"),
    ([5], "each test must be"),
    ([{"call": "f()"}], "each test must be"),
    ([{"call": "f(", "expected": 1}], "must be Python"),
    ([{"call": "x = 1", "expected": 1}], "must be Python"),
    ([{"call": 5, "expected": 1}], "must be Python"),
    ([{"stdin": "1"}], "each test must be"),
    ([{"stdin": "1", "stdout": 1}], "each test must be"),
    (["f() == 5"], "it is not a single assert"),
    (["assert f()"], "no comparison with =="),
    (["assert f() != 5"], "no comparison with =="),
    (["assert f() is True"], "no comparison with =="),
    (["assert 1 < f() == 5"], "no comparison with =="),
    (["assert not f() == 5"], "no comparison with =="),
    (["assert f() == g()"], "'g\\(\\)' is not a literal"),
    (["assert f() == 2**3"], "is not a literal"),
    (["assert f() == 1; assert f() == 2"], "it is not a single assert"),
    (["assert f( == 1"], "must be Python"),
]


@pytest.mark.parametrize(("tests", "reason"), WRONG)
def test_other_forms_are_refused_with_row_and_form(tests, reason):
    with pytest.raises(ValueError, match=f"^row 7.*{reason}") as caught:
        cases_of(tests, "row 7")
    assert "assert EXPRESSION == LITERAL" in str(caught.value) or reason in ("must be Python",)
