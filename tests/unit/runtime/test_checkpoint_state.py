"""What a plugin may keep in a checkpoint, and weights that may not be saved."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from hf_rlhf.conformance.common import equal
from hf_rlhf.runtime.checkpoint_state import first_non_finite, load_state, plain, save_state
from hf_rlhf.runtime.errors import CheckpointError

Pair = namedtuple("Pair", "a b")
Color = Enum("Color", "red")


KEPT: list[Any] = [
    *(None, True, 3, -1.5, 2j, "text", b"bytes", 10**40, [1, [2.0]], (1, "a"), {1, 2}, {"a": {(1, 2): [None]}}),
    *(OrderedDict(a=1), Counter("aab"), torch.arange(3), torch.nn.Parameter(torch.ones(2)), {"x": torch.ones(())}),
]


@pytest.mark.parametrize("value", KEPT, ids=repr)
def test_plain_state_comes_back_as_it_was(value, tmp_path):
    save_state(tmp_path, 0, {"x": plain(value, "x")})
    found = load_state(tmp_path, 0)["x"]
    assert equal(found, value)
    assert isinstance(value, torch.Tensor) or type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "due"),
    [(np.float64(0.1), 0.1), (np.int64(7), 7), (np.bool_(True), True), (np.str_("a"), "a"), ([np.int8(3)], [3])],
)
def test_numbers_of_numpy_that_equal_pythons_become_pythons(value, due):
    found = plain(value, "x")
    assert found == due
    assert type(found) is type(due)


REFUSED: list[Any] = [
    *(
        np.arange(3),
        np.float32(0.1),
        deque([1]),
        defaultdict(int, a=1),
        frozenset([1]),
        range(3),
        Color.red,
        Fraction(1, 3),
    ),
    *(
        Pair(1, 2),
        lambda: 0,
        object(),
        RuntimeError("x"),
        type,
        np.datetime64("2020-01-01"),
        slice(1),
        torch.Generator(),
    ),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda x: type(x).__name__)
def test_other_state_is_refused_with_its_place_and_its_type(value):
    with pytest.raises(
        CheckpointError, match=r"rewards\.0=mine: state_dict\(\)\['window'\]\[1\] must hold numbers"
    ) as error:
        plain({"window": [0, value]}, "rewards.0=mine: state_dict()")
    assert type(value).__name__ in str(error.value)


def test_state_that_contains_itself_is_refused():
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CheckpointError, match="must not contain itself"):
        plain(value, "x")


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_first_tensor_that_is_not_finite_is_named(bad, dtype):
    tensors = {
        "a": torch.ones(5, dtype=dtype),
        "ids": torch.arange(3),
        "b": torch.ones(2, 3, dtype=dtype),
        "c": torch.ones(1),
    }
    assert first_non_finite(tensors.items()) is None
    tensors["b"][1, 2] = bad
    tensors["c"][0] = bad
    assert first_non_finite(tensors.items()) == "b"


def test_finite_values_whose_sum_overflows_are_finite():
    assert first_non_finite([("a", torch.full((4,), 3e38)), ("b", torch.full((4,), 6e4, dtype=torch.float16))]) is None
    assert first_non_finite([("a", torch.tensor([3e38, 3e38, float("nan")]))]) == "a"
    assert first_non_finite([("a", torch.tensor([float("inf"), -float("inf")]))]) == "a"
    assert first_non_finite([("none", torch.ones(0)), ("int", torch.ones(2, dtype=torch.int8))]) is None
