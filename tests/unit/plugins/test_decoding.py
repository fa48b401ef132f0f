"""The decode loop of `generate` gives what plain forwards give, and does no more work than it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hf_rlhf import load_plugin
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf_plugins.rollout import _checks, _layouts
from hf_rlhf_plugins.rollout.generate import Generate
from tests.helpers.decoding import ARCHITECTURES, Synchronisations, plain_logps, policy_of, prompts_of, tiny

CPU = torch.device("cpu")


def engine(**settings: Any) -> Any:
    return load_plugin("rollout", "generate", **{"max_new_tokens": 24, **settings})


@pytest.mark.proves("rollout.generate", how="parity", tolerance="exact")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate(name):
    policy, prompts = policy_of(tiny(name)), prompts_of(9, 3, 5, 9)
    assert _checks.unserved(policy.model, CPU, 40) is None
    found = engine()(policy, prompts, 2, temperature=0.0)
    config = GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0, eos_token_id=1)
    for i, prompt in enumerate(prompts):
        due = policy.model.generate(input_ids=torch.tensor([prompt.ids]), generation_config=config)
        assert found.ids[2 * i] == found.ids[2 * i + 1] == due[0, len(prompt.ids) :].tolist()
    assert found.logps is None


@pytest.mark.proves("rollout.generate", how="parity", tolerance="1e-5")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_those_of_a_fresh_forward(name):
    policy, prompts = policy_of(tiny(name)), prompts_of(9, 3, 5, 9, 2)
    with seeded("drawn", 0):
        found = engine(temperature=3.0)(policy, prompts, 4)
    assert len({len(ids) for ids in found.ids}) > 1, "rows leave at different steps"
    for row, (ids, logps) in enumerate(zip(found.ids, found.logps, strict=True)):
        due = plain_logps(policy.model, prompts[row // 4].ids, ids, 3.0)
        torch.testing.assert_close(torch.tensor(logps), due, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_rows_depend_neither_on_the_rows_at_a_time_nor_on_the_prompts_of_a_forward(name, monkeypatch):
    policy, prompts = policy_of(tiny(name).double()), prompts_of(9, 3, 20, 9)

    def drawn(**settings: Any) -> Any:
        with seeded("drawn", 0):
            found = engine(temperature=3.0, **settings)(policy, prompts, 3)
        return found.ids, torch.tensor([x for row in found.logps for x in row], dtype=torch.float64)

    ids, logps = drawn()
    monkeypatch.setattr("hf_rlhf_plugins.rollout._decoding.PREFILL", 10)
    monkeypatch.setattr(_layouts, "GROWTH", 2)
    for rows in (None, 3, 6):
        again, others = drawn(max_rows=rows)
        assert again == ids
        torch.testing.assert_close(others, logps)
    assert logps.dtype == torch.float64


def test_a_row_does_not_depend_on_a_prompt_behind_it():
    policy, prompts = policy_of(tiny("qwen2").double()), prompts_of(5, 8, 6)
    with seeded("drawn", 0):
        three = engine(temperature=2.0)(policy, prompts, 3)
    with seeded("drawn", 0):
        two = engine(temperature=2.0)(policy, prompts[:2], 3)
    assert three.ids[:6] == two.ids
    assert three.ids[6:9] != two.ids[:3]


def test_equal_prompts_pass_through_the_model_once_and_keep_rows_of_their_own():
    policy, prompts = policy_of(tiny("llama")), prompts_of(7, 4)
    with Forwards(policy.model) as forwards, seeded("drawn", 0):
        found = engine(temperature=3.0, max_new_tokens=8, kernel="model")(
            policy, [prompts[0], prompts[1], prompts[0]], 2
        )
    assert forwards.shapes[0] == (1, 11)
    assert len({tuple(ids) for ids in found.ids}) == 6
    for row, ids in enumerate(found.ids):
        prompt = prompts[(row // 2) % 2]
        due = plain_logps(policy.model, prompt.ids, ids, 3.0)
        torch.testing.assert_close(torch.tensor(found.logps[row]), due, rtol=0, atol=1e-5)


def test_a_window_sees_itself_and_the_tokens_before_it():
    model = tiny("mistral")
    wide = tiny("mistral")
    wide.config.sliding_window = None
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = None
    ids = torch.tensor([prompts_of(12)[0].ids])
    assert not torch.allclose(model(input_ids=ids).logits[:, -1], wide(input_ids=ids).logits[:, -1], atol=1e-2)
    for some in (model, wide):
        found = engine(temperature=3.0)(policy_of(some), prompts_of(12), 2)
        due = plain_logps(some, prompts_of(12)[0].ids, found.ids[0], 3.0)
        torch.testing.assert_close(torch.tensor(found.logps[0]), due, rtol=0, atol=1e-5)


# Work


class Forwards:
    """The shape of `input_ids` of each forward of the model."""

    def __init__(self, model: Any):
        _checks.unserved(model, CPU, 1)  # its own forwards are not counted
        self.model, self.shapes = model, []

    def __enter__(self) -> Forwards:
        self._handle = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        return self

    def __exit__(self, *reason: Any) -> None:
        self._handle.remove()


class Forced(Generate):
    """Ends each row at a length of its own."""

    lengths: torch.Tensor

    def sampler(self, *args: Any) -> Any:
        own = super().sampler(*args)

        def choose(logits: torch.Tensor, rows: torch.Tensor, step: int) -> Any:
            logits[:, 1] = -torch.inf
            tokens, logps = own(logits, rows, step)
            return torch.where(self.lengths[rows] <= step + 1, 1, tokens), logps

        return choose


def forced(lengths: torch.Tensor, longest: int) -> Forced:
    made = Forced(max_new_tokens=longest, kernel="model")
    made.lengths = lengths
    return made


def lognormal(rows: int, longest: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1000)
    return (0.3 * longest * (0.75 * torch.randn(rows, generator=draw)).exp()).round().clamp(4, longest).long()


def test_prompts_once_and_rows_leave():
    policy, prompts = policy_of(tiny("llama")), prompts_of(30, 11, 17, 40)
    lengths = lognormal(32, 128)
    with Forwards(policy.model) as forwards:
        found = forced(lengths, 128)(policy, prompts, 8)
    assert [len(ids) for ids in found.ids] == lengths.tolist()
    prefill, *steps = forwards.shapes
    assert prefill == (1, 30 + 11 + 17 + 40)
    assert all(width == 1 for _, width in steps)
    assert len(steps) <= int(lengths.max()) + 2
    floor = int((lengths - 1).sum())
    waiting = sum((-int(n)) % 4 for n in lengths)  # steps until the next look
    assert sum(rows for rows, _ in steps) <= floor + waiting
    assert sum(rows for rows, _ in steps) <= 1.05 * floor


@pytest.mark.parametrize("longest", [20, 60])
def test_the_host_waits_at_most_once_in_four_steps(longest):
    policy, prompts = policy_of(tiny("llama")), prompts_of(5, 9)
    made = forced(torch.full((8,), longest), longest)
    made(policy, prompts, 4)
    with Forwards(policy.model) as forwards, Reads() as reads, Synchronisations() as waits:
        made(policy, prompts, 4)
    assert len(forwards.shapes) == longest
    assert reads.count <= longest / 4 + 6, "two seeds, and four times what was drawn"
    assert waits.count <= 6, "whatever the number of steps"


class Reads:
    """Counts `Tensor.tolist`, `.item`, `.cpu` and `bool(tensor)` by what they call."""

    NAMES = ("tolist", "item", "cpu", "__bool__", "__int__", "__float__")

    def __enter__(self) -> Reads:
        self.count, self._own = 0, {name: getattr(torch.Tensor, name) for name in self.NAMES}
        for name, own in self._own.items():
            setattr(torch.Tensor, name, self._counting(own))
        return self

    def _counting(self, own: Any) -> Any:
        def counted(tensor: Any, *args: Any) -> Any:
            self.count += 1
            return own(tensor, *args)

        return counted

    def __exit__(self, *reason: Any) -> None:
        for name, own in self._own.items():
            setattr(torch.Tensor, name, own)


def test_a_row_alone_needs_a_forward_per_token():
    policy = policy_of(tiny("qwen3"))
    with Forwards(policy.model) as forwards:
        forced(torch.tensor([13]), 13)(policy, prompts_of(6), 1)
    assert forwards.shapes == [(1, 6)] + [(1, 1)] * 12


def test_greedy_decodes_one_row_per_prompt():
    policy = policy_of(tiny("qwen3"))
    with Forwards(policy.model) as forwards:
        engine(max_new_tokens=5, kernel="model")(policy, prompts_of(6, 4), 7, temperature=0.0)
    assert forwards.shapes == [(1, 10)] + [(2, 1)] * 4


# Layouts


def test_prompts_of_very_different_lengths_are_attended_to_apart():
    assert _layouts.buckets([3, 3, 4, 50, 60]) == [(0, 3), (3, 5)]
    assert _layouts.buckets([5]) == [(0, 1)]


def test_rows_and_prompts_that_leave_change_no_other_row():
    torch.manual_seed(0)
    lengths, of_row = [3, 5], [0, 1, 1, 0, 1]
    heads = [(torch.randn(2, 8, 4), torch.randn(2, 8, 4))]

    def steps(layout: Any, rows: list[int], count: int) -> torch.Tensor:
        outs = []
        for _ in range(count):
            draw = [torch.Generator().manual_seed(100 * row + layout.steps) for row in rows]
            q, k, v = (torch.stack([torch.randn(n, 1, 4, generator=g) for g in draw]) for n in (4, 2, 2))
            layout.start()
            outs.append(layout.attend(None, q, k, v, scaling=0.5, window=None, softcap=None))
        return torch.stack(outs)

    whole = _layouts.Shared(heads, lengths, of_row)
    before = steps(whole, [0, 1, 2, 3, 4], 3)
    after = steps(whole, [0, 1, 2, 3, 4], 2)
    left = _layouts.Shared(heads, lengths, of_row)
    torch.testing.assert_close(steps(left, [0, 1, 2, 3, 4], 3), before)
    left.keep([4, 1, 2])
    torch.testing.assert_close(steps(left, [4, 1, 2], 2), after[:, [4, 1, 2]])
    assert left._lengths == [5]
