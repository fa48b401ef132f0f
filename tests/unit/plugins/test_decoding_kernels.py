"""Kernels of a decode step give what the model gives, are chosen by trial and fall back with a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rlhf import load_plugin
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf_plugins.rollout import _kernels
from hf_rlhf_plugins.rollout._decoding import Decoder
from hf_rlhf_plugins.rollout._layouts import Shared
from tests.helpers.decoding import ARCHITECTURES, policy_of, prompts_of, tiny

CPU = torch.device("cpu")
LEAN = {"llama", "qwen2", "qwen3"}


def engine(**settings: Any) -> Any:
    return load_plugin("rollout", "generate", **{"max_new_tokens": 24, "temperature": 3.0, **settings})


def drawn(made: Any, policy: Any) -> Any:
    with seeded("drawn", 0):
        return made(policy, prompts_of(9, 3, 5, 9, 2), 4)


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with seeded("adapter"):
        return get_peft_model(model, settings).eval()


@pytest.mark.proves("rollout.generate", how="parity", tolerance="5e-6")
@pytest.mark.parametrize("name", [*ARCHITECTURES, "adapter"])
def test_the_best_kernel_draws_what_the_model_draws(name):
    policy = policy_of(with_adapter(tiny("qwen2")) if name == "adapter" else tiny(name))
    made = engine()
    found, due = drawn(made, policy), drawn(engine(kernel="model"), policy)
    assert made.settled() == {"kernel": "lean" if name in LEAN else "onednn"}
    assert found.ids == due.ids
    for ours, plain in zip(found.logps, due.logps, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=0, atol=5e-6)
    assert not [m for m in policy.model.modules() if "forward" in vars(m)]


def test_long_sums_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(_kernels, "DEPTH", 7)
    layer = torch.nn.Linear(20, 6)
    x, more = torch.randn(3, 20), torch.randn(3, 6)
    found = _kernels.Product(layer, onednn=True)
    assert len(found._parts) == 3
    torch.testing.assert_close(found(x, more), layer(x) + more)


@pytest.mark.parametrize("broken", ["product", "layers", "all"])
def test_a_kernel_that_is_another_model_is_not_used_and_the_reason_is_said(broken, monkeypatch):
    multiply, run = _kernels.Product.__call__, _kernels._Layer.__call__
    if broken != "layers":
        monkeypatch.setattr(_kernels.Product, "__call__", lambda self, *args: multiply(self, *args) * 1.001)
    if broken != "product":
        monkeypatch.setattr(
            _kernels._Layer, "__call__", lambda self, x, cos, sin, layout: run(self, x, cos, -sin, layout)
        )
    made, policy = engine(), policy_of(tiny("llama"))
    found = drawn(made, policy)
    kernel = "onednn" if broken == "layers" else "model"
    said = " ".join(made.remarks(None))
    assert made.settled() == {"kernel": kernel}
    assert f"decoding steps run by kernel {kernel} (lean: " in said
    assert ("its logits differ" if broken == "layers" else "oneDNN's product of 1 rows with") in said
    if kernel == "model":
        assert found == drawn(engine(kernel="model"), policy)


def test_a_kernel_that_was_asked_for_by_name_is_never_replaced():
    with pytest.raises(
        ValueError, match=r"rollout.kernel=lean does not decode GPT2LMHeadModel: .* Set rollout.kernel=auto"
    ):
        drawn(engine(kernel="lean"), policy_of(tiny("gpt2")))
    with pytest.raises(ValueError, match=r"kernel=onednn .* not in float32"):
        drawn(engine(kernel="onednn"), policy_of(tiny("gpt2").double()))


def test_float64_bfloat16_and_autocast_decode_as_the_model_does():
    for made, model in ((engine(), tiny("qwen2").double()), (engine(decode_dtype="bfloat16"), tiny("qwen2"))):
        drawn(made, policy_of(model))
        assert made.settled() == {"kernel": "model"}
    made = engine()
    with torch.autocast("cpu", torch.bfloat16):
        drawn(made, policy_of(tiny("qwen2")))
    assert made.settled() == {"kernel": "model"}


def test_layers_that_somebody_changed_are_left_to_the_model():
    changed = tiny("qwen3")
    changed.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out + 1)
    made = engine()
    drawn(made, policy_of(changed))
    assert made.settled() == {"kernel": "onednn"}
    model = tiny("qwen3")
    made = engine()
    drawn(made, policy_of(model))
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out + 1)
    assert drawn(made, policy_of(model)) == drawn(engine(kernel="model"), policy_of(model))


def test_weights_are_reordered_once_per_rollout_and_anew_when_they_changed(monkeypatch):
    made, policy = engine(max_new_tokens=4), replace(policy_of(tiny("qwen2")), version="run:0")
    drawn(made, policy)
    count, own = [], _kernels.prepare
    monkeypatch.setattr(_kernels, "prepare", lambda *args: (count.append(args), own(*args))[1])
    made.wake("weights")
    first = [drawn(made, policy) for _ in range(3)]
    assert len(count) == 1
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    policy.version = "run:1"
    second = [drawn(made, policy) for _ in range(2)]
    assert len(count) == 2
    assert first[0] == first[2] != second[0] == second[1]
    made.sleep()
    assert not made._ready
    drawn(made, policy)
    assert len(count) == 3


class Operations(TorchDispatchMode):
    """Counts what computes: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        self.count += not views and "empty" not in func.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "most"), [("llama", 27), ("qwen2", 27), ("qwen3", 30)])
def test_a_layer_takes_at_most_thirty_operations_in_a_step(name, most):
    model = tiny(name)
    kernel = _kernels.prepare("lean", model)
    decoder = Decoder(model=model, eos=[1], steps=9, device=CPU, kernel=kernel)
    with torch.inference_mode():
        layout = Shared(decoder._prefill([[3] * 5, [4] * 9], [])[0], [5, 9], [0, 0, 1, 1])
        counts = []
        for layers in (4, 4, 3):  # the first step makes room
            kernel._layers = kernel._layers[:layers]
            layout.start()
            with Operations() as operations:
                kernel(torch.tensor([3, 4, 5, 6]), torch.tensor([5, 5, 9, 9]), layout)
            counts.append(operations.count)
    assert counts[1] - counts[2] <= most
