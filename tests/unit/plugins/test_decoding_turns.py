"""Conversations in the decode loop: keys and values of live rows stay, and change no log-prob."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.axes import RolloutEngine
from hf_rlhf.batch import Prompt
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf_plugins.rollout import _decoding, _layouts
from hf_rlhf_plugins.rollout._turns import Kept
from tests.helpers.decoding import ARCHITECTURES, plain_logps, policy_of, prompts_of, tiny

CPU = torch.device("cpu")


def engine(**settings: Any) -> Any:
    return load_plugin("rollout", "generate", **{"temperature": 3.0, "max_new_tokens": 8, **settings})


class Talk:
    """Turns of numbered rows on one model, each compared with plain forwards."""

    def __init__(self, name: str, tolerance: float = 1e-5):
        self.policy, self.tolerance, self.turn = policy_of(tiny(name)), tolerance, 0
        self.kept, self.rows = Kept(), {}

    def ask(self, rows: dict[int, list[int]], group: int = 1, steps: int = 12) -> dict[int, list[int]]:
        """Continue rows, whose tokens are given; returns what was sampled."""
        self.turn += 1
        prompts = [Prompt(ids=ids, prompt="") for ids in list(rows.values())[::group]]
        with seeded("turn", self.turn):
            sampler = engine(max_new_tokens=steps).sampler(prompts, group, 3.0, CPU, True)
            decode = _decoding.Decoder(model=self.policy.model, eos=range(1, 9), steps=steps, device=CPU)
            ids, logps = decode([p.ids for p in prompts], group, sampler, kept=self.kept.ask(list(rows)))
        for row, sampled, reported in zip(rows, ids, logps, strict=True):
            due = plain_logps(self.policy.model, rows[row], sampled, 3.0)
            torch.testing.assert_close(torch.tensor(reported), due, rtol=0, atol=self.tolerance)
            self.rows[row] = rows[row] + sampled
        return dict(zip(rows, ids, strict=True))


def told(row: int, length: int) -> list[int]:
    return [(7 + 5 * row + 3 * i) % 90 + 2 for i in range(length)]


@pytest.mark.proves("rollout.generate", how="parity", tolerance="1e-5")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_of_every_turn_are_those_of_a_plain_forward(name):
    talk = Talk(name)
    first = prompts_of(9, 3, 5)
    sampled = talk.ask({row: first[row // 4].ids for row in range(12)}, group=4)
    assert len({len(ids) for ids in sampled.values()}) > 1, "rows leave at different steps"
    assert talk.kept.prefilled == 9 + 3 + 5
    for turn in range(3):
        talk.kept.prefilled = 0
        asked = {row: talk.rows[row] + told(row, 1 + (row + turn) % 4) for row in range(12) if (row + turn) % 5}
        talk.ask(asked)
        assert talk.kept.prefilled == sum(1 + (1 + (row + turn) % 4) for row in asked), (
            "the last sampled token and the new ones"
        )


def test_a_prefix_that_changed_is_kept_up_to_the_change_and_a_fork_takes_what_it_has_in_common():
    talk = Talk("llama")
    talk.ask({0: prompts_of(20)[0].ids, 1: prompts_of(20)[0].ids}, group=2)
    whole = talk.rows[0]
    talk.kept.prefilled = 0
    talk.ask({0: whole[:17] + told(0, 6)})
    assert talk.kept.prefilled == 6
    talk.kept.prefilled = 0
    common = talk.rows[0][:21]
    talk.ask({7: common + told(3, 4)})
    assert talk.kept.prefilled == 4
    talk.ask({0: talk.rows[0] + told(0, 2), 7: talk.rows[7] + told(1, 1), 1: whole[:5]})


def test_equal_rows_pass_once_and_equal_tokens_are_no_new_prefill():
    talk = Talk("qwen3")
    same = prompts_of(8)[0].ids
    talk.ask({3: same, 9: same, 4: same}, group=1)
    assert talk.kept.prefilled == 8
    talk.kept.prefilled = 0
    talk.ask({3: same, 4: same}, group=1)
    assert talk.kept.prefilled == 1, "the last token, whose logits are due"


def test_parts_of_a_prefill_and_growing_buffers_change_nothing(monkeypatch):
    monkeypatch.setattr(_decoding, "PREFILL", 5)
    monkeypatch.setattr(_layouts, "GROWTH", 2)
    talk = Talk("gemma2")
    talk.ask({row: prompts_of(9, 3, 5)[row].ids for row in range(3)})
    for turn in range(2):
        talk.ask({row: talk.rows[row] + told(row, 3 + turn) for row in (2, 0, 1)})


def test_one_sampled_token_and_a_row_that_ends_at_once():
    talk = Talk("llama")
    talk.ask({0: [5, 6, 7], 1: [9]}, steps=1)
    talk.ask({0: talk.rows[0] + [4], 1: talk.rows[1] + [8, 8]}, steps=1)
    talk.ask({0: talk.rows[0] + [4], 1: talk.rows[1] + [8, 8]}, steps=9)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"top_k": 20}, {"max_rows": 3}])
def test_a_session_draws_what_whole_calls_draw(settings):
    policy, prompts, made = policy_of(tiny("llama").double()), prompts_of(9, 4), engine(**settings)
    drawn = []
    for opened in (made.session, lambda policy: RolloutEngine.session(made, policy)):
        with opened(policy) as session:
            with seeded("turn", 1):
                found = session.ask(range(6), prompts, 3)
            session.drop(4)
            rows = [0, 1, 2, 3, 5]
            again = [Prompt(ids=prompts[row // 3].ids + found.ids[row] + told(row, 3), prompt="") for row in rows]
            with seeded("turn", 2):
                more = session.ask(rows, again)
        drawn.append((found, more))
    (kept, kept_more), (whole, whole_more) = drawn
    assert (kept.ids, kept.finish_reasons, kept.logps) == (whole.ids, whole.finish_reasons, whole.logps)
    assert kept_more.ids == whole_more.ids
    torch.testing.assert_close(
        torch.tensor([x for row in kept_more.logps for x in row]),
        torch.tensor([x for row in whole_more.logps for x in row]),
        rtol=0,
        atol=1e-6,
    )


def test_greedy_rows_of_a_session_are_those_of_whole_calls():
    policy, prompts = policy_of(tiny("qwen3")), prompts_of(9, 4)
    with engine().session(policy, temperature=0.0) as session:
        first = session.ask(range(4), prompts, 2)
        asked = [Prompt(ids=prompts[row // 2].ids + first.ids[row] + told(row, 2), prompt="") for row in range(4)]
        second = session.ask(range(4), asked)
        assert session.kept.prefilled == 13 + 3 * 4
    assert first.ids == engine()(policy, prompts, 2, temperature=0.0).ids
    assert second.ids == engine()(policy, asked, 1, temperature=0.0).ids


def test_a_row_that_was_dropped_holds_nothing_and_a_rounded_copy_is_made_once(monkeypatch):
    copies = []
    own = _decoding.copy_of
    monkeypatch.setattr(_decoding, "copy_of", lambda model, dtype: copies.append(dtype) or own(model, dtype))
    with engine(decode_dtype="bfloat16").session(policy_of(tiny("llama"))) as session:
        session.ask([0, 1], prompts_of(5, 6))
        session.ask([0, 1], prompts_of(7, 8))
        session.drop(0)
        assert set(session.kept.rows) == {1}
    assert copies == [torch.bfloat16]


def test_what_model_generate_samples_is_asked_by_whole_calls():
    policy, prompts = policy_of(tiny("llama")), prompts_of(6)
    made = engine(generation_kwargs={"use_cache": True})
    with made.session(policy) as session:
        with seeded("turn", 1):
            first = session.ask([0, 1], prompts, 2)
        with seeded("turn", 2):
            second = session.ask([1], prompts_of(9))
        with seeded("turn", 2):
            assert second.ids == made(policy, prompts_of(9), 1).ids
    assert len(first.ids) == 2
