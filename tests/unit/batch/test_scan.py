"""The scans behind discounting and GAE, whitening and group statistics on tensors of every shape of mask."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rlhf.batch import Scored
from hf_rlhf_plugins.advantages import _tokens
from hf_rlhf_plugins.advantages._tokens import gae, on_mask, reward_to_go, whiten_tokens
from tests.helpers.advantage_batches import full, of

MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda u: torch.ones_like(u),
    "none": lambda u: torch.zeros_like(u),
    "cut off on the right": lambda u: (torch.arange(u.size(1)) < (u[:, :1] * (u.size(1) + 1)).long()).to(u),
    "padded on the left": lambda u: (torch.arange(u.size(1)) >= (u[:, :1] * u.size(1)).long()).to(u),
    "tool tokens": lambda u: (u > 0.3).to(u),
    "one hole": lambda u: (torch.arange(u.size(1)) != u.size(1) // 2).to(u).expand_as(u),
    "hardly any": lambda u: (u > 0.95).to(u),
}


def case(mask: str, rows: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask."""
    generator = torch.Generator().manual_seed(length)

    def draw() -> Tensor:
        return torch.rand(rows, length, generator=generator, dtype=torch.float64)

    return (2 * draw() - 1).to(dtype), draw().to(dtype), MASKS[mask](draw()).to(dtype)


def loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: list[float]) -> Tensor:
    """GAE by its definition, token after token on Python floats."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for i, (row, value, on) in enumerate(zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True)):
        later = following = 0.0
        for t in reversed(range(len(row))):
            if on[t]:
                later = row[t] + gamma * following - value[t] + gamma * lam[i] * later
                following, advantages[i, t] = value[t], later
    return advantages


@pytest.fixture(params=[1, 2**18], ids=["a_row_at_a_time", "many_rows_at_a_time"])
def part(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are worked on together."""
    monkeypatch.setattr(_tokens, "PART", request.param)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 15, 16, 17, 80])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.5), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0), (1e-3, 1.0)])
def test_gae_is_the_loop_on_every_mask(mask: str, length: int, gamma: float, lam: float):
    rewards, values, on = case(mask, 5, length)
    got = gae(rewards, values, on, gamma, lam)
    torch.testing.assert_close(got, loop(rewards, values, on, gamma, [lam] * 5), rtol=1e-12, atol=1e-12)
    assert (got[on == 0] == 0).all()


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.9, 1.0])
def test_the_reward_to_go_is_the_loop_on_every_mask(mask: str, gamma: float):
    for length in (1, 7, 37):
        rewards, _, on = case(mask, 3, length)
        want = loop(rewards, torch.zeros_like(rewards), on, gamma, [1.0] * 3)
        torch.testing.assert_close(reward_to_go(rewards, on, gamma), want, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("mask", ["cut off on the right", "tool tokens"])
def test_each_row_may_have_a_lambda_of_its_own(mask: str):
    lams = [0.0, 0.1, 0.5, 0.95, 1.0]
    rewards, values, on = case(mask, 5, 50)
    got = gae(rewards, values, on, 0.99, torch.tensor(lams, dtype=torch.float64))
    torch.testing.assert_close(got, loop(rewards, values, on, 0.99, lams), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["all", "cut off on the right", "tool tokens"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.999, 1.0), (0.99, 0.95), (1.0, 0.0)])
def test_float32_stays_within_1e_5_of_a_loop_in_float64(mask: str, gamma: float, lam: float):
    rewards, values, on = case(mask, 4, 2048, torch.float32)
    want = loop(rewards, values, on, gamma, [lam] * 4)
    assert (gae(rewards, values, on, gamma, lam).double() - want).abs().max() < 1e-5 * want.abs().max()


def test_a_lowered_precision_of_matrix_products_changes_nothing():
    rewards, values, on = case("tool tokens", 4, 300, torch.float32)
    before = torch.get_float32_matmul_precision()
    want = gae(rewards, values, on, 0.99, 0.95), whiten_tokens(rewards, on)
    torch.set_float32_matmul_precision("medium")
    try:
        got = gae(rewards, values, on, 0.99, 0.95), whiten_tokens(rewards, on)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_stands_off_the_mask_does_not_matter_even_where_it_is_no_number(odd: float):
    for mask in MASKS:
        rewards, values, on = case(mask, 3, 20)
        off = on == 0
        got = gae(rewards.masked_fill(off, odd), values.masked_fill(off, odd), on, 0.9, 0.5)
        assert torch.equal(got, gae(rewards, values, on, 0.9, 0.5))
        assert torch.equal(reward_to_go(rewards.masked_fill(off, odd), on), reward_to_go(rewards, on))
        assert on_mask(torch.full_like(on, odd), on)[off].abs().sum() == 0


def test_views_of_larger_tensors_are_read_and_left_as_they_are():
    wide = case("tool tokens", 6, 80)
    kept = copy.deepcopy(wide)
    cut = [x[::2, 1::2] for x in wide]
    torch.testing.assert_close(gae(*cut, 0.9, 0.5), gae(*(x.clone() for x in cut), 0.9, 0.5), rtol=0, atol=1e-14)
    torch.testing.assert_close(whiten_tokens(cut[0], cut[2]), whiten_tokens(cut[0].clone(), cut[2].clone()))
    assert all(torch.equal(*pair) for pair in zip(wide, kept, strict=True))


def test_of_no_rows_and_of_no_tokens_there_is_nothing():
    for shape in ((0, 5), (3, 0), (0, 0)):
        empty = torch.zeros(shape, dtype=torch.float64)
        assert gae(empty, empty, empty, 1.0, 1.0).shape == shape
        assert reward_to_go(empty, empty).shape == shape
        assert whiten_tokens(empty, empty).shape == shape
        assert Scored(mask=empty, token_rewards=empty, group_ids=torch.zeros(shape[0])).returns().shape == shape[:1]


# Whitening


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("mask", ["all", "cut off on the right", "tool tokens", "hardly any"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_is_its_definition(mask: str, ddof: int):
    x, _, on = case(mask, 6, 40)
    tokens = x[on > 0]
    want = torch.zeros_like(x).masked_scatter(
        on > 0, (tokens - tokens.mean()) / (tokens.var(correction=ddof) + 1e-8).sqrt()
    )
    torch.testing.assert_close(whiten_tokens(x, on, ddof), want, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("part")
def test_whitening_keeps_the_digits_of_small_differences_between_large_numbers():
    x = 1e6 + torch.arange(64, dtype=torch.float32).view(4, 16)
    got = whiten_tokens(x, torch.ones_like(x)).double()
    want = whiten_tokens(x.double(), torch.ones_like(x).double())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("part")
def test_whitening_gives_exactly_0_where_all_are_equal_and_where_there_is_no_token():
    on = MASKS["tool tokens"](torch.rand(5, 9, generator=torch.Generator().manual_seed(0)))
    assert (whiten_tokens(torch.full((5, 9), 0.2) * on, on) == 0).all()
    assert (whiten_tokens(torch.rand(5, 9), torch.zeros(5, 9)) == 0).all()


# Work


class Made(TorchDispatchMode):
    """Counts operators by name, and new tensors of `numel` numbers or more."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.calls, self.large = numel, Counter[str](), 0
        self.known: set[int] = set()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        if isinstance(made, Tensor) and made.numel() >= self.numel and not func.is_view:
            place = made.untyped_storage().data_ptr()
            given = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
            if place not in self.known | given:
                self.large += 1
                self.known.add(place)
                self.kept.append(made)  # so that its place is not given out again
        return made


@pytest.mark.parametrize("mask", ["cut off on the right", "tool tokens"])
def test_one_large_tensor_is_made_the_result(mask: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_tokens, "PART", 100)
    rewards, values, on = case(mask, 64, 10)

    def large(run: Callable[[], Any]) -> int:
        with Made(rewards.numel()) as made:
            run()
        return made.large

    assert large(lambda: rewards * on) == 1
    assert large(lambda: gae(rewards, values, on, 0.99, 0.95)) == 1
    assert large(lambda: reward_to_go(rewards, on, 0.99)) == 1
    assert large(lambda: whiten_tokens(rewards, on)) == 1


def test_a_return_is_the_sum_over_the_mask_without_a_product_of_all_rows():
    rewards, _, on = case("tool tokens", 300, 2000)
    batch = Scored(mask=on, token_rewards=rewards, group_ids=torch.zeros(300))
    with Made(rewards.numel()) as made:
        got = batch.returns()
    assert made.large == 0
    torch.testing.assert_close(got, (rewards * on).sum(1), rtol=1e-12, atol=1e-12)


def test_groups_are_found_once_for_all_statistics():
    batch = full()
    with Made(10**9) as made:
        of(batch, "group_norm")
        of(batch, "leave_one_out")
        batch.group_std(batch.returns())
    assert made.calls["_unique2"] == 1


def test_other_groups_are_found_anew():
    batch = full(group_sizes=(4, 2))
    x = torch.arange(6.0)
    assert batch.group_sum(x).tolist() == [6.0] * 4 + [9.0] * 2
    replaced = dataclasses.replace(batch, group_ids=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert replaced.group_sum(x).tolist() == [1.0, 1.0, 5.0, 5.0, 9.0, 9.0]
    assert batch.group_sum(x).tolist() == [6.0] * 4 + [9.0] * 2
    batch.group_ids = torch.tensor([7, 7, 7, 7, 7, 7])
    assert batch.group_sum(x).tolist() == [15.0] * 6
    assert copy.deepcopy(batch).group_sum(x).tolist() == [15.0] * 6
