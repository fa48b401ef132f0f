"""Every row of the table of faults, injected for real."""

from __future__ import annotations

import pytest

from benchmarks.faults.table import FAULTS, verdict
from tests.helpers.processes import warm
from tests.helpers.waits import scaled

QUICK = {1, 24, 29, 38, 41, 48}
"""Rows that run among the fast tests; the others are as quick, but many."""


@pytest.mark.parametrize("number", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_a_run_survives(number, tmp_path):
    found, happened = verdict(number, tmp_path, program=warm("hf_rlhf")[:-1], patience=scaled(1.0))
    if found == "cannot run":
        pytest.skip(happened)
    assert found == "pass", happened


def test_the_table_is_complete():
    assert list(FAULTS) == [n for n in range(1, 53) if n != 47]
