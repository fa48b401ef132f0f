"""Forks: from some token on, a row's context is another one. They give the log-probs and gradients of rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf.modeling import packing
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.token_batch import Attention, TokenBatch, pieces_of
from hf_rlhf.training.micro_batches import Batching
from tests.unit.modeling.test_packing import distance, gradient, packing_model
from tests.unit.modeling.test_policy import PAD, build, mask_of, models, tolerance

P = [(7 * i) % 50 + 3 for i in range(19)]
"""A prompt of 19 tokens, longer than the sliding windows of `models`."""
Q = [9, 8]
OWN = [*range(20, 32)]
Row = tuple[list[int], list[int], list[int], list[tuple[int, list[int]]]]
ROWS: list[Row] = [
    (P, [20, 21, 22, 23], [1, 1, 0, 1], []),
    (P, OWN, [1] * 12, [(3, [*P, 40, 41, *range(50, 59)]), (7, [*P, 40, 41, *range(50, 59), 42, 43, 44])]),
    (P, OWN, [1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0], [(2, [*P[:15], 33]), (6, [5]), (9, [5, 6])]),
    (P, OWN[:6], [1, 1, 1, 0, 0, 1], [(2, [*P, 20, 21, 34, 35]), (5, [*P, 20, 21])]),
    (Q, [24, 25, 26], [0, 0, 1], [(0, [*P, 20, 21, 34, 35])]),
    (Q, [24, 25, 26], [1, 1, 1], [(1, [9])]),
    (P, [20, 21, 22, 23], [1, 1, 0, 1], []),
]
"""Prompts shared with forks and among forks, forks of forks, one that returns to its row, one at the first token, a piece
without a sampled token, a context that has a part of the prompt, and equal rows."""


def batch(attention: Attention = "packed", dtype: torch.dtype = torch.float64, rows: Any = None) -> TokenBatch:
    prompts, completions, masks, forks = zip(*(rows or ROWS), strict=True)
    return TokenBatch(prompts, completions, mask_of(masks, dtype), PAD, attention, forks)


def apart(model: Any, rows: Any = None, temperature: float = 1.0) -> Tensor:
    """(B, T) log-probs of one forward of transformers for each piece."""
    found = []
    for prompt, completion, _, forks in rows or ROWS:
        parts = []
        for start, stop, before in pieces_of(prompt, len(completion), forks):
            ids = torch.tensor([*before, *completion[start:stop]])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(before) - 1 : -1] / temperature
            parts.append(logits.log_softmax(-1).gather(1, ids[len(before) :, None])[:, 0])
        found.append(torch.cat(parts))
    masks = mask_of([mask for _, _, mask, _ in rows or ROWS], torch.float64)
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True) * masks


@pytest.mark.parametrize("attention", ["packed", "padded", "flex"])
@pytest.mark.parametrize("name", models())
def test_forks_have_the_log_probs_of_forwards_of_their_own(name: str, attention: Attention) -> None:
    model = packing_model(name) if attention != "padded" else build(name, torch.float64)
    with torch.no_grad():
        found = ActorCritic(model, None, 0.8)(batch(attention))["logps"]
        due = apart(model, temperature=0.8)
    torch.testing.assert_close(found, due, rtol=0, atol=tolerance(name, 1e-12))
    assert int((found != 0).sum()) == sum(sum(mask) for _, _, mask, _ in ROWS)


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2, norms, soft-capped, windowed"])
def test_gradients_of_forks_are_those_of_forwards_of_their_own(name: str, attention: Attention) -> None:
    model = packing_model(name)
    found, due = (
        gradient(model, ActorCritic(model, None, 1.0)(batch(attention))["logps"]),
        gradient(model, apart(model)),
    )
    assert distance(found, due) < (1e-12 if name == "gpt2" else 1e-6)


def test_a_row_cut_into_forks_has_the_log_probs_of_the_whole_row() -> None:
    """What stood in the completion with mask 0 stands in the context of a fork."""
    model = packing_model("llama")
    whole: Row = (P, [20, 21, 60, 61, 62, 22, 23, 63, 24], [1, 1, 0, 0, 0, 1, 1, 0, 1], [])
    forks = [(2, [*P, 20, 21, 60, 61, 62]), (4, [*P, 20, 21, 60, 61, 62, 22, 23, 63])]
    module = ActorCritic(model, None, 1.0)
    with torch.no_grad():
        one, other = (module(batch(rows=[row]))["logps"] for row in (whole, (P, [20, 21, 22, 23, 24], [1] * 5, forks)))
    torch.testing.assert_close(one[one != 0], other[0], rtol=0, atol=1e-12)


def test_what_forks_begin_with_enters_a_packed_row_once() -> None:
    context = [*P, *range(60, 80)]
    rows: list[Row] = [(P, [20, 21, 22, 30 + i], [1] * 4, [(2, [*context, 20, 21])]) for i in range(3)]
    assert batch(rows=rows).positions == len(context) + 1 + 3  # the rows' token 20, once, and what all forks have
    rows = [(P, [20 + i, 21, 22, 23], [1] * 4, [(2, [*context, 40 + i, 21])]) for i in range(3)]
    assert batch(rows=rows).positions == len(context) + 3 * (1 + 3)


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("most", [20, 60, 100, None])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_micro_batches_count_the_pieces(rows: int, most: int | None, attention: Attention) -> None:
    prompts, completions, _, forks = zip(*ROWS, strict=True)
    batching = Batching(pad=PAD, max_rows=rows, max_tokens=most, attention=attention)
    parts = batching.cut(range(len(ROWS)), prompts, completions, forks)
    assert sorted(row for part in parts for row in part) == list(range(len(ROWS)))
    for part in parts:
        some = batch(attention, rows=[ROWS[row] for row in part])
        bounded = most is None or attention == "padded"
        assert not bounded or len(some.pieces.prompt_ids) <= rows or len(part) == 1
        assert most is None or some.positions <= most or len(part) == 1


def test_forks_stand_behind_another_prompt_where_they_begin_with_the_rows_own() -> None:
    hint = [1, 2, 3]
    moved = batch(rows=[ROWS[1]]).behind([[*hint, *P]])
    assert moved.forks is not None
    assert moved.forks[0] == [(start, [*hint, *ids]) for start, ids in ROWS[1][3]]


def test_values_of_a_fork_are_read_in_its_own_context() -> None:
    model = build("llama", torch.float64)

    class Head(torch.nn.Module):
        on_trunk = True

        def forward(self, some: TokenBatch, states: Tensor | None) -> Tensor:
            assert states is not None
            return states.sum(1)

    module = ActorCritic(model, Head(), 1.0)
    with torch.no_grad():
        whole = module(batch(), values=True)["values"]
        for i, (prompt, completion, mask, forks) in enumerate(ROWS):
            for start, stop, before in pieces_of(prompt, len(completion), forks):
                row = (list(before), completion[start:stop], mask[start:stop], [])
                own = module(batch(rows=[row]), values=True)["values"][0]
                torch.testing.assert_close(whole[i, start:stop], own, rtol=0, atol=1e-12)


def test_two_rows_share_no_branch_that_is_too_short() -> None:
    layout = packing.Packed([[1, 2, 3], [1, 2, 4]], [[5], [6]], [1, 1], torch.device("cpu"), nested=True)
    assert layout.input_ids.size(1) == 8
