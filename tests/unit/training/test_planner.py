"""The planner: operations by hand and by torch's own count, constants from runs, waiting devices."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_rlhf.training.planner.devices import DEVICES, Constants, fit
from hf_rlhf.training.planner.schedule import simulate
from hf_rlhf.training.planner.work import Cost, Shape, Work


def test_operations_of_a_pass_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 96}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.zeros((4, 24), dtype=torch.long), use_cache=False)
    shape = Shape(prompts=4, group=1, prompt_tokens=0, mean=24, longest=24)
    found = Cost.of(model, False).reading(shape, shared=False, half=False).flops
    assert found == pytest.approx(counted.get_total_flops(), rel=0.05)  # attention counts what is not causal as well
    twice = Cost.of(model, False).reading(shape, shared=False, half=False, times=2).flops
    assert twice == 2 * found


def test_a_shared_prompt_is_computed_once_and_decoding_reads_the_weights_at_each_step():
    cost = Cost(trunk=10.0, head=0.0, context=0.0, layers=2, width=8, weights=100.0, cache=1.0)
    shape = Shape(prompts=3, group=4, prompt_tokens=5, mean=6, longest=7)
    assert cost.reading(shape, shared=True, half=False).flops == 10 * (3 * 5 + 12 * 6)
    assert cost.reading(shape, shared=False, half=False).flops == 10 * 12 * (5 + 6)
    prefill, decoding = cost.sampling(shape, 1.0, 1, False, 1.0)
    assert prefill.flops == 10 * 15
    assert decoding.moved == 7 * 100 + 12 * 6 * (5 + 3)
    assert decoding.calls == 7 * 2


def test_two_runs_give_the_constants_and_one_scales_those_of_the_device():
    device, true = DEVICES["cpu"], Constants(DEVICES["cpu"], {"update": (3e-4, 1.7)})
    runs = [{"update": [Work(flops=flops, calls=calls)]} for flops, calls in ((1e9, 40), (8e9, 90), (3e9, 400))]
    seconds = [{"update": true.seconds("update", work["update"])} for work in runs]
    two = fit(device, list(zip(runs[:2], seconds[:2], strict=True)))
    assert two.fitted["update"] == pytest.approx((3e-4, 1.7))
    assert two.seconds("update", runs[2]["update"]) == pytest.approx(seconds[2]["update"])
    one = fit(device, [(runs[0], seconds[0])])
    assert one.seconds("update", runs[0]["update"]) == pytest.approx(seconds[0]["update"])


def test_no_constant_is_below_0():
    works = [{"update": [Work(flops=1e9, calls=100)]}, {"update": [Work(flops=4e9, calls=100)]}]
    constants = fit(DEVICES["cpu"], [(works[0], {"update": 1.0}), (works[1], {"update": 9.0})])
    assert min(constants.fitted["update"]) >= 0


@pytest.mark.parametrize(
    ("ahead", "step"), [(None, 3.0 + 0.5 + 2.0), (0, 3.0 + 0.5 + 2.0), (1, 3.0 + 0.5), (2, 3.0 + 0.5)]
)
def test_devices_wait_for_each_other_unless_rollouts_are_ahead(ahead, step):
    found = simulate(3.0, 0.5, 2.0, ahead=ahead, steps=2000)
    assert found.step == pytest.approx(step, rel=2e-3)
    if ahead == 0:
        assert found.idle["trainer"] == pytest.approx(3.0 / 5.5, rel=2e-3)


def test_two_rollouts_ahead_even_out_rollouts_of_unequal_length():
    one, two = (simulate(2.0, 0.0, 2.0, ahead=k, spread=0.4, steps=2000).step for k in (1, 2))
    assert 2.0 <= two < one - 0.02
