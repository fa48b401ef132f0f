"""Corrections for a sampler that is not the trainer's policy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.testing import scored

RATIO = torch.tensor([[0.25, 1.0, 3.0, 8.0], [0.5, 1.0, 1.2, 8.0], [3.0, 1.0, 2.0, 8.0]], dtype=torch.float64)
"""p_trainer / p_sampler; rows of 0.75, 0.6 and 6."""
MASK = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]], dtype=torch.float64)


def factors(name: str, ratio: Tensor = RATIO, mask: Tensor = MASK, **settings: Any) -> Tensor:
    sampler_logps = torch.full_like(ratio, -1.5)
    return load_plugin("rollout_correction", name, **settings)(sampler_logps + ratio.log(), sampler_logps, mask)


def close(got: Tensor, want: list[list[float]]) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.proves("rollout_correction.none", how="closed form", tolerance="exact")
def test_no_correction_multiplies_by_1():
    assert (factors("none") == 1).all()
    assert load_plugin("rollout_correction", "none").needs == frozenset()


@pytest.mark.proves("rollout_correction.truncated", how="closed form", tolerance="1e-12")
def test_truncated_stops_at_c():
    close(factors("truncated", c=2.0), [[0.25, 1, 2, 0], [0.5, 1, 1.2, 0], [2, 1, 2, 0]])
    close(factors("truncated", c=4.0, level="sequence"), [[0.75] * 3 + [0], [0.6] * 3 + [0], [4] * 3 + [0]])


@pytest.mark.proves("rollout_correction.masked", how="closed form", tolerance="1e-12")
def test_masked_drops_what_is_out_of_bounds():
    close(factors("masked", low=0.4, c=2.5), [[0, 1, 0, 0], [0.5, 1, 1.2, 0], [0, 1, 2, 0]])
    close(factors("masked", low=0.0, c=2.5), [[0.25, 1, 0, 0], [0.5, 1, 1.2, 0], [0, 1, 2, 0]])
    close(factors("masked", low=0.7, c=5.0, level="sequence"), [[0.75] * 3 + [0], [0] * 4, [0] * 4])
    close(factors("masked", low=0.0, c=7.0, level="sequence"), [[0.75] * 3 + [0], [0.6] * 3 + [0], [6] * 3 + [0]])


def test_a_ratio_on_the_bound_is_kept():
    old_logps = torch.tensor([[0.5, 1 - 1e-9], [2.0, 2.0 + 1e-9]], dtype=torch.float64).log()
    zero, ones = torch.zeros_like(old_logps), torch.ones_like(old_logps)
    masked = load_plugin("rollout_correction", "masked", low=0.5, c=2.0)(old_logps, zero, ones)
    close(masked, [[0.5, 1 - 1e-9], [2.0, 0.0]])
    masked = load_plugin("rollout_correction", "masked", low=1.0, c=1.0)(old_logps * 0 + 1e-9, zero, ones)
    assert (masked == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.proves("rollout_correction.truncated", "rollout_correction.masked", how="invariance", tolerance="exact")
def test_within_their_bounds_both_are_the_ratio_itself(level: str):
    batch = scored()
    given = (batch.old_logps, batch.sampler_logps, batch.mask)
    truncated = load_plugin("rollout_correction", "truncated", c=1e9, level=level)(*given)
    masked = load_plugin("rollout_correction", "masked", low=0.0, c=1e9, level=level)(*given)
    assert torch.equal(truncated, masked)
    d = (batch.old_logps - batch.sampler_logps) * batch.mask
    want = (d if level == "token" else d.sum(1, keepdim=True)).exp() * batch.mask
    torch.testing.assert_close(truncated, want, rtol=1e-12, atol=1e-12)


@pytest.mark.proves("rollout_correction.truncated", how="exact enumeration", tolerance="1e-12")
def test_at_level_sequence_the_correction_is_exact_where_c_does_not_bind():
    """Every sequence of two tokens out of three, sampled by one policy, as if sampled by the other."""
    generator = torch.Generator().manual_seed(0)
    (first, second), (first_s, second_s) = (
        [torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1) for shape in ((3,), (3, 3))]
        for _ in range(2)
    )
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    trainer = torch.stack([first[pairs[:, 0]], second[pairs[:, 0], pairs[:, 1]]], 1)
    sampler = torch.stack([first_s[pairs[:, 0]], second_s[pairs[:, 0], pairs[:, 1]]], 1)
    reward = torch.randn(9, generator=generator, dtype=torch.float64)
    exact = load_plugin("rollout_correction", "truncated", c=1e6, level="sequence")
    weight = exact(trainer, sampler, torch.ones_like(trainer))[:, 0]
    got, want = (sampler.sum(1).exp() * weight * reward).sum(), (trainer.sum(1).exp() * reward).sum()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["truncated", "masked"])
def test_nothing_overflows_and_no_gradient_passes(name: str, level: str):
    old_logps = torch.tensor([[0.0, -1.0, 900.0], [-200.0, -1.0, -1.0]], requires_grad=True)
    sampler_logps = torch.tensor([[-200.0, -1.0, 0.0], [0.0, -math.inf, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    given = load_plugin("rollout_correction", name, level=level)(old_logps, sampler_logps, mask)
    assert given.isfinite().all()
    assert not given.requires_grad
    assert (given[mask == 0] == 0).all()


@pytest.mark.parametrize("name", ["truncated", "masked"])
def test_a_sampler_that_agrees_changes_nothing(name: str):
    for level in ("token", "sequence"):
        assert torch.equal(factors(name, torch.ones_like(MASK), level=level), MASK)


@pytest.mark.parametrize(
    ("name", "wrong"), [("truncated", {"c": 0.9}), ("masked", {"c": 0.9}), ("masked", {"low": 1.1})], ids=str
)
def test_bounds_that_exclude_1_are_refused(name: str, wrong: dict[str, float]):
    with pytest.raises(Exception, match=next(iter(wrong))):
        load_plugin("rollout_correction", name, **wrong)
