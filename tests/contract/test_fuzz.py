"""Random overrides are accepted or refused with a reason, and what is accepted trains."""

from __future__ import annotations

from benchmarks import fuzz


def test_random_overrides_are_accepted_or_refused_with_a_reason():
    accepted, crashes = fuzz.fuzz(500)
    assert not crashes
    assert accepted > 5


def test_accepted_recipes_train_or_say_why_not():
    ended_well, crashes = fuzz.train_accepted(10)
    assert not crashes
    assert ended_well > 5
