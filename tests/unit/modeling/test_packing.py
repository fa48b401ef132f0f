"""Packed rows give the log-probs and gradients of a plain padded forward, and fit the bounds of a micro-batch."""

from __future__ import annotations

import itertools
import logging
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_rlhf.modeling import packing, token_batch
from hf_rlhf.modeling.attention import attend
from hf_rlhf.modeling.packing import Packed, Span
from hf_rlhf.modeling.policy import ActorCritic, why_not_packed
from hf_rlhf.modeling.token_batch import Attention, TokenBatch, packs
from hf_rlhf.training.micro_batches import Batching, choose_attention
from tests.helpers import runs
from tests.unit.modeling.test_policy import PAD, SMALL, build, mask_of, models, tolerance

LONG = [(7 * i) % 50 + 3 for i in range(11)]
"""A prompt longer than the sliding windows of `models`, which are 4 tokens."""
ROWS: list[tuple[list[int], list[int], list[int]]] = [
    ([5, 6, 7], [20, 21, 22, 23], [1, 1, 0, 1]),
    ([8], [1], [1]),
    (LONG, [30, 31, 32], [0, 0, 1]),
    ([5, 6, 7], [24, 25], [0, 0]),
    ([60, 61], [62, 63], [0, 0]),
    ([5, 6, 7], [26, 27, 28, 29, 30, 31], [1, 0, 0, 1, 1, 0]),
    ([8], [35, 36, 37, 38, 39], [1, 1, 1, 1, 1]),
    (LONG, [1], [1]),
    ([5, 6, 7], [20, 21, 22, 23], [1, 1, 0, 1]),
    ([5, 6], [7, 20, 21], [1, 1, 1]),
]
"""Prompts shared by rows in different places and by a row twice, holes, rows without sampled tokens, one-token prompts and
completions, a prompt that begins like another one."""


def packing_model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model that takes packed rows: where it found a difference, every forward would be padded and every test pass."""
    model = build(name, dtype)
    assert packs(model.base_model)
    return model


def batch(attention: Attention, dtype: torch.dtype = torch.float64, rows: Any = None) -> TokenBatch:
    prompts, completions, masks = zip(*(rows or ROWS), strict=True)
    return TokenBatch(prompts, completions, mask_of(masks, dtype), PAD, attention)


def textbook(model: Any, rows: Any = None, temperature: float = 1.0) -> Tensor:
    """(B, T) log-probs of one forward of transformers, padded on the right, where causal attention sees nothing of it."""
    prompts, completions, masks = zip(*(rows or ROWS), strict=True)
    texts = [torch.tensor([*p, *c]) for p, c in zip(prompts, completions, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
    logits = model(input_ids=input_ids, use_cache=False).logits
    log_probs = (logits / temperature).log_softmax(-1)
    found = []
    for row, prompt, completion in zip(log_probs, prompts, completions, strict=True):
        own = row[len(prompt) - 1 : len(prompt) + len(completion) - 1]
        found.append(own.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True) * mask_of(masks, logits.dtype)


def gradient(model: Any, logps: Tensor) -> Tensor:
    """Of a weighed sum, by all parameters that are trained, in one vector."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 2, logps.numel(), dtype=logps.dtype).view_as(logps)
    parts = torch.autograd.grad((logps * weights).sum(), trained, materialize_grads=True, allow_unused=True)
    return torch.cat([part.flatten() for part in parts])


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("dtype", "atol", "relative"), [(torch.float64, 1e-12, 1e-6), (torch.float32, 1e-5, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("name", models())
def test_log_probs_and_gradients_are_those_of_a_plain_padded_forward(name, dtype, atol, relative):
    model = packing_model(name, dtype)
    found, due = ActorCritic(model, None, 0.8)(batch("packed", dtype))["logps"], textbook(model, temperature=0.8)
    torch.testing.assert_close(found, due, rtol=0, atol=tolerance(name, atol))
    assert due.abs().max() > 1
    exact = name == "gpt2" and dtype == torch.float64  # the norms of the others round each token's gradient to float32
    assert distance(gradient(model, found), gradient(model, due)) < (1e-12 if exact else relative)


@pytest.mark.parametrize("name", models())
def test_flex_attention_gives_the_same(name):
    module = ActorCritic(packing_model(name), None, 1.0)
    with torch.no_grad():
        found, due = (module(batch(attention))["logps"] for attention in ("flex", "packed"))
    torch.testing.assert_close(found, due, rtol=0, atol=tolerance(name, 1e-12))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["llama", "gemma2, norms, soft-capped, windowed", "gpt2", "mistral, windowed"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model = packing_model(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    due = gradient(model, ActorCritic(model, None, 1.0)(batch("packed"))["logps"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    norm, runs_of_layer = next(m for n, m in layer.named_modules() if "norm" in n or "ln_1" in n), []
    norm.register_forward_hook(lambda *_: runs_of_layer.append(1))
    own = layer._gradient_checkpointing_func
    logps = ActorCritic(model, None, 1.0)(batch("packed"))["logps"]
    assert layer._gradient_checkpointing_func is own
    assert len(runs_of_layer) == 1
    found = gradient_by_backward(model, logps) if reentrant else gradient(model, logps)
    assert len(runs_of_layer) == 2, "the layer runs again in the backward"
    assert distance(found, due) < tolerance(name, 1e-12)
    assert model.config._attn_implementation != "hf_rlhf"


def gradient_by_backward(model: Any, logps: Tensor) -> Tensor:
    """What `gradient` gives, for reentrant checkpoints, which know `backward` alone."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, logps.numel(), dtype=logps.dtype).view_as(logps)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj", "lm_head"]], ids=["trunk", "and head"])
def test_adapters_learn_as_in_a_plain_padded_forward(targets, checkpointed):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(packing_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    if checkpointed:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert why_not_packed(model) is None
    found, due = ActorCritic(model, None, 1.0)(batch("packed"))["logps"], textbook(model)
    torch.testing.assert_close(found, due, rtol=0, atol=1e-12)
    assert distance(gradient(model, found), gradient(model, due)) < 1e-6, "norms round each token's to float32"
    with torch.no_grad(), model.disable_adapter():
        assert distance(textbook(model), due) > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen2, tied", "gemma2, norms, soft-capped, windowed", "gpt2"])
def test_under_autocast_rows_are_rounded_no_more_than_padded_ones(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models()[name]().eval()
    assert packs(model.base_model)
    exact = textbook(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, due = (ActorCritic(model, None, 1.0)(batch(a, torch.float32))["logps"] for a in ("packed", "padded"))
    assert found.dtype == torch.float32
    assert 0 < (due - exact).abs().max() < 0.05
    assert (found - exact).abs().max() < 2 * (due - exact).abs().max()
    assert distance(gradient(model, found), gradient(model, due)) < 0.05


def test_the_batch_does_not_grow_where_nothing_is_sampled():
    """A row without a sampled token is left out, with its prompt where no other row needs it."""
    layout, _ = batch("packed").packed
    text = layout.input_ids[0].tolist()
    assert not {60, 61, 62, 63} & set(text)
    assert text.count(5) == 2, "once as a prompt of three tokens, once as one of two"
    assert len(text) == sum(map(len, ([5, 6, 7], [8], LONG, [5, 6]))) + sum([3, 0, 2, 4, 4, 0, 2])


# Buckets inside attention


def spans(sizes: list[int], before: list[int]) -> list[Span]:
    prompts = [Span(0, size) for size in before]
    return [Span(0, size, prompt) for size, prompt in zip(sizes, prompts, strict=True)]


@pytest.mark.parametrize("limit", [1, 600, 3000, 2**23])
def test_no_mask_is_larger_than_its_bound(limit, monkeypatch):
    """Neither where a longer prompt stands before a shorter completion; one row alone may be larger."""
    monkeypatch.setattr(packing, "MASK_ELEMENTS", limit)
    given = [
        spans([10, 9], [1, 20]),
        spans([30, 29, 28, 14, 13, 12, 3, 2, 1], [5, 1, 20, 30, 2, 2, 9, 40, 1]),
        spans([1] * 40, list(range(1, 41))),
        spans([100, 60, 30, 8, 8], [2] * 5),
    ]
    for some in given:
        buckets = packing._buckets(some)
        assert sorted(map(id, itertools.chain(*buckets))) == sorted(map(id, some))
        for bucket in buckets:
            block = packing._Block(bucket, torch.device("cpu"))
            mask = block.mask(None, torch.float32)
            assert mask.shape == (len(bucket), 1, block.longest, block.before + block.longest)
            assert mask.numel() <= limit or len(bucket) == 1
    if limit == 2**23:
        assert max(len(packing._buckets(some)) for some in given) < 5, "rows share buckets where they may"


def wide_rows() -> list[tuple[list[int], list[int], list[int]]]:
    sizes = [(1, 40), (3, 22), (12, 20), (1, 9), (3, 2), (12, 38), (12, 1)]
    return [
        ([(3 * i + p) % 60 + 3 for i in range(p)], [(5 * i + c) % 60 + 3 for i in range(c)], [1] * c) for p, c in sizes
    ]


@pytest.mark.parametrize("name", ["llama", "gemma2, norms, soft-capped, windowed", "mistral, windowed"])
def test_buckets_change_nothing(name, monkeypatch):
    model, rows = packing_model(name), wide_rows()

    def results() -> tuple[int, Tensor, Tensor]:
        some = batch("packed", rows=rows)
        logps = ActorCritic(model, None, 1.0)(some)["logps"]
        return len(some.packed[0]._blocks), logps, gradient(model, logps)

    _, logps, by_parameters = results()
    torch.testing.assert_close(logps, textbook(model, rows), rtol=0, atol=tolerance(name, 1e-12))
    counts = set()
    for spread, elements in itertools.product([0.0, 0.9], [1, 3000, 2**23]):
        monkeypatch.setattr(packing, "SPREAD", spread)
        monkeypatch.setattr(packing, "MASK_ELEMENTS", elements)
        blocks, again, gradients = results()
        counts.add(blocks)
        torch.testing.assert_close(again, logps, rtol=0, atol=tolerance(name, 1e-12))
        assert distance(gradients, by_parameters) < tolerance(name, 1e-12)
    assert min(counts) == 2 < max(counts)


# The model is left as it was


class Stop(Exception):
    pass


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2, norms, soft-capped, windowed"])
def test_the_model_is_left_as_it_was_also_after_an_error(name, fails, train):
    model = packing_model(name).train(train)
    model.gradient_checkpointing_enable()

    def state() -> list[Any]:
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        found = [layer._gradient_checkpointing_func for layer in layers]
        return [*found, model.config._attn_implementation, *(m.training for m in model.modules())]

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        raise Stop

    before, (layout, _) = state(), batch("packed").packed
    due = textbook(model.eval()).detach()
    model.train(train)
    if fails:
        layout.attend = attend  # type: ignore[method-assign]
        with pytest.raises(Stop), attend(model.base_model, layout) as keywords:
            model.base_model(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords)
    else:
        batch("packed").states(model.base_model)
    assert state() == before
    assert torch.equal(textbook(model.eval()), due)


# Architectures that cannot


def others() -> dict[str, tuple[Callable[[], Any], str]]:
    """Models whose rows enter padded, and why."""
    t = transformers
    gpt = {"vocab_size": 128, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "max_position_embeddings": 64}
    bert = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = {**SMALL, "vocab_size": 128}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    chunks = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 4}
    return {
        "bloom": (lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)), ""),
        "falcon, alibi": (
            lambda: t.FalconForCausalLM(
                t.FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
            ),
            "ALiBi",
        ),
        "mamba": (
            lambda: t.MambaForCausalLM(
                t.MambaConfig(vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0)
            ),
            "linear_attention are neither full nor sliding-window",
        ),
        "gpt-neo, an attention of its own": (
            lambda: t.GPTNeoForCausalLM(
                t.GPTNeoConfig(**gpt, window_size=4, attention_types=[[["global", "local"], 1]], eos_token_id=1)
            ),
            "differ from those of padded rows",
        ),
        "gpt-oss, sinks": (
            lambda: t.GptOssForCausalLM(t.GptOssConfig(**small, **experts, head_dim=8)),
            "passes s_aux to its attention",
        ),
        "llama 4, chunks": (lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(**small, **chunks, head_dim=8)), ""),
        "bert, a head of several layers": (
            lambda: t.BertLMHeadModel(t.BertConfig(**bert, intermediate_size=48, is_decoder=True)),
            "more than a trunk with a linear head",
        ),
    }


def hidden() -> dict[str, tuple[Callable[[], Any], str]]:
    """Models that say of a window or of dropout nothing that their attention is told in evaluation."""
    t = transformers
    small = {**SMALL, "vocab_size": 128, "sliding_window": 16}
    gpt = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.5}
    opt = {"vocab_size": 128, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "phimoe, window": (
            lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**small, num_local_experts=4, num_experts_per_tok=2)),
            "its sliding window of 16 tokens is in its mask alone",
        ),
        "doge, window": (
            lambda: t.DogeForCausalLM(t.DogeConfig(**small, layer_types=["sliding_attention", "full_attention"])),
            "its sliding window of 16 tokens is in its mask alone",
        ),
        "gpt2, dropout": (lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt)), "its attention has dropout"),
        "opt, dropout": (
            lambda: t.OPTForCausalLM(t.OPTConfig(**opt, word_embed_proj_dim=32, attention_dropout=0.5)),
            "its attention has dropout",
        ),
    }


@pytest.mark.parametrize("name", hidden())
def test_what_attention_is_not_told_in_a_short_forward_is_found_in_the_configuration(name):
    """Rows longer than the window; a window of 16 tokens does not show in the few tokens of a first look."""
    make, why = hidden()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    rows = [
        ([5 + i for i in range(25)], [40 - i for i in range(12)], [1] * 12),
        ([3], [7 + i for i in range(30)], [1] * 30),
    ]
    assert why in str(why_not_packed(model))
    with torch.no_grad():
        found = ActorCritic(model, None, 1.0)(batch("packed", torch.float32, rows))["logps"]
        torch.testing.assert_close(found, textbook(model, rows), rtol=0, atol=2e-5)


def other(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = others()[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


@pytest.mark.parametrize("name", others())
def test_other_architectures_run_padded_and_say_why_once(name, caplog):
    model, why = other(name), others()[name][1]
    module = ActorCritic(model, None, 0.9)
    with caplog.at_level(logging.WARNING, "hf_rlhf.modeling.policy"), torch.no_grad():
        found = module(batch("packed", torch.float32))["logps"]
        module(batch("packed", torch.float32))
        due = textbook(model, temperature=0.9)
    reason = why_not_packed(model)
    assert reason is not None
    assert why in reason
    torch.testing.assert_close(found, due, rtol=0, atol=2e-5)
    warnings = [r.getMessage() for r in caplog.records if "using padded rows, which is slower" in r.getMessage()]
    assert len(warnings) <= 1
    if "linear head" not in reason:
        assert warnings[0].endswith(reason)


def test_gradients_of_a_head_of_several_layers_are_those_of_its_own_forward():
    model = other("bert, a head of several layers")
    found, due = ActorCritic(model, None, 1.0)(batch("packed", torch.float32))["logps"], textbook(model)
    assert distance(gradient(model, found), gradient(model, due)) < 1e-5


@pytest.mark.parametrize("attention", ["packed", "flex"])
@pytest.mark.parametrize("name", ["mamba", "bert, a head of several layers"])
def test_asking_for_packed_rows_where_they_cannot_be_is_an_error_at_the_start(name, attention, tmp_path):
    with pytest.raises(
        ValueError, match=rf"update\.attention={attention} is not supported by \w+: .*Set it to auto or padded"
    ):
        runs.trainer(tmp_path, policy=other(name), update={"attention": attention})
    made = runs.trainer(tmp_path, policy=other(name))
    assert made.collector.forwards.batching.attention == "padded"


# What an accelerator is asked


@pytest.mark.parametrize("name", models())
def test_gradients_of_both_layouts_agree_where_they_are_compared(name, monkeypatch):
    monkeypatch.setattr(token_batch, "_accelerated", lambda trunk: True)
    assert token_batch._why_not_packed(build(name, torch.float32).base_model, "packed") is None


def on_an_accelerator(model: Any) -> Any:
    """The model, which then says that it lies on a GPU. Its own forwards stay on the CPU."""
    assert why_not_packed(model) is None
    model.__class__ = type("There", (type(model),), {"device": torch.device("cuda")})
    return model


def test_auto_takes_flex_attention_where_it_gives_what_padded_rows_give():
    model = on_an_accelerator(build("llama", torch.float32))
    assert choose_attention(runs.recipe().algorithm(), model) == "flex"


class OutOfResources(Exception):
    """As Triton's errors, no RuntimeError."""


def cannot_be_compiled(*args: Any, **kwargs: Any) -> Tensor:
    raise OutOfResources("out of resource: shared memory\nRequired: 164352")


@pytest.mark.parametrize(
    ("flex", "reason"),
    [
        (cannot_be_compiled, r"its layers cannot \(OutOfResources: out of resource: shared memory\)$"),
        (lambda query, *args, **kwargs: query, "its states differ from those of padded rows by"),
    ],
    ids=["a kernel that cannot be built", "a kernel that is wrong"],
)
def test_auto_falls_back_from_flex_attention_and_says_why(flex, reason, monkeypatch, caplog):
    model = on_an_accelerator(build("llama", torch.float32))
    monkeypatch.setattr(packing, "_flex", lambda compiled: flex)
    with caplog.at_level(logging.WARNING, "hf_rlhf.modeling.token_batch"):
        assert choose_attention(runs.recipe().algorithm(), model) == "packed"
        assert choose_attention(runs.recipe().algorithm(), model) == "packed"
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(f"using packed rows without FlexAttention, which is slower: {reason}", said)
    with pytest.raises(ValueError, match=r"update\.attention=flex is not supported"):
        choose_attention(runs.recipe(update={"attention": "flex"}).algorithm(), model)


def test_auto_falls_back_from_a_layout_whose_gradients_are_wrong(monkeypatch):
    attend = Packed.attend

    def no_gradient(self: Packed, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attend(self, module, query.detach(), *args, **kwargs)

    monkeypatch.setattr(Packed, "attend", no_gradient)
    trunk = build("llama", torch.float32).base_model
    assert token_batch._why_not_packed(trunk, "packed") is None
    monkeypatch.setattr(token_batch, "_accelerated", lambda trunk: True)
    assert "its gradients differ from those of padded rows" in str(token_batch._why_not_packed(trunk, "packed"))


def test_flex_attention_runs_under_autocast_where_norms_leave_queries_in_float32():
    model = build("qwen3", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, due = (batch(attention).states(model.base_model) for attention in ("flex", "packed"))
    assert (found - due).abs().max() < 0.05 * due.abs().max()


# Equal rows


@pytest.mark.parametrize("attention", ["packed", "flex"])
def test_equal_rows_enter_once_with_the_gradients_of_rows_apart(attention):
    model = packing_model("llama")
    rows = [ROWS[0], ROWS[5], ROWS[0], ROWS[6], ([8], [35, 36, 37, 38, 50], [1, 0, 1, 1, 1]), ROWS[0], ROWS[8]]
    prompts, completions, masks = zip(*rows, strict=True)
    both = [TokenBatch(prompts, completions, mask_of(masks), PAD, attention, once=once) for once in (True, False)]
    assert [b.positions for b in both] == [3 + 3 + 4 + 1 + 4, 3 + 4 * 3 + 4 + 1 + 2 * 4]
    with torch.set_grad_enabled(attention == "packed"):  # FlexAttention has no backward on a CPU
        one, apart = (ActorCritic(model, None, 1.0)(b)["logps"] for b in both)
    torch.testing.assert_close(one, apart, rtol=0, atol=1e-12)
    if attention == "packed":
        assert distance(gradient(model, one), gradient(model, apart)) < 1e-6


# Micro-batches


def cut(max_rows: int = 100, max_tokens: int | None = None, attention: Attention = "packed") -> list[list[int]]:
    prompts, completions, _ = zip(*GROUPS, strict=True)
    batching = Batching(pad=PAD, max_rows=max_rows, max_tokens=max_tokens, attention=attention)
    return batching.cut(range(len(GROUPS)), prompts, completions)


GROUPS = [
    ([10 + p] * (3 + 2 * p), [40 + i] * (1 + (p * i) % 7), [1] * (1 + (p * i) % 7)) for i in range(6) for p in range(5)
]
"""Five prompts of 3 to 11 tokens with six completions each, the rows of a prompt scattered."""


@pytest.mark.parametrize("max_rows", [1, 4, 6, 100])
@pytest.mark.parametrize("max_tokens", [1, 12, 20, 34, 60, None])
def test_a_micro_batch_holds_no_more_than_its_bounds(max_rows, max_tokens):
    parts = cut(max_rows, max_tokens)
    assert sorted(row for part in parts for row in part) == list(range(len(GROUPS)))
    for part in parts:
        some = batch("packed", rows=[GROUPS[row] for row in part])
        assert max_tokens is not None or len(part) <= max_rows
        assert max_tokens is None or some.positions <= max_tokens or len(part) == 1
        assert some.positions == sum(map(len, {tuple(GROUPS[row][0]) for row in part})) + sum(
            len(GROUPS[row][1]) - 1 for row in part
        )


@pytest.mark.parametrize("max_tokens", [34, 60, 200])
def test_the_rows_of_a_prompt_stay_together_where_they_fit(max_tokens):
    parts = cut(max_tokens=max_tokens)
    for group in packing.by_prompt([prompt for prompt, _, _ in GROUPS]):
        cost = len(GROUPS[group[0]][0]) + sum(len(GROUPS[row][1]) for row in group)
        homes = [part for part in parts if set(part) & set(group)]
        assert (len(homes) == 1) == (cost <= max_tokens)


def test_packed_rows_fill_nine_tenths_of_the_token_budget_whatever_the_bound_of_rows():
    draw = random.Random(0)
    prompts = [[5 + i] * (20 + 40 * i // 64) for i in range(64) for _ in range(8)]
    completions = [[7] * min(128, 1 + int(draw.lognormvariate(3.5, 0.8))) for _ in prompts]
    batching = Batching(pad=PAD, max_rows=8, max_tokens=2048)
    parts = batching.cut(range(len(prompts)), prompts, completions)
    used = [
        sum(map(len, {tuple(prompts[row]) for row in part})) + sum(len(completions[row]) for row in part)
        for part in parts
    ]
    assert max(used) <= 2048
    assert sum(used) > 0.9 * 2048 * len(parts)
    assert max(map(len, parts)) > 8


def test_padded_rows_count_their_padding():
    for part in cut(max_tokens=40, attention="padded"):
        some = batch("padded", rows=[GROUPS[row] for row in part])
        assert some.positions == len(part) * max(len(GROUPS[row][0]) + len(GROUPS[row][1]) for row in part) <= 40
    assert len(cut(max_tokens=40)) < len(cut(max_tokens=40, attention="padded"))


def saved_bytes(model: Any, some: TokenBatch) -> int:
    """What a forward leaves for its backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logps = ActorCritic(model, None, 1.0)(some)["logps"]
    assert logps.requires_grad
    return sum(kept.values())


def test_what_the_backward_needs_does_not_grow_with_the_rows_at_one_budget():
    """More rows make more micro-batches, not larger ones."""
    model = packing_model("llama", torch.float32)
    largest = []
    for count in (6, 12, 48):
        rows = [([5 + i // 3, 6, 7, 8], [20 + i % 3] * 8, [1] * 8) for i in range(count)]
        prompts, completions, _ = zip(*rows, strict=True)
        parts = Batching(pad=PAD, max_rows=1000, max_tokens=56).cut(range(count), prompts, completions)
        assert len(parts) == count // 6
        largest.append(
            max(saved_bytes(model, batch("packed", torch.float32, [rows[i] for i in part])) for part in parts)
        )
    assert largest[0] == largest[1] == largest[2]
    whole = saved_bytes(model, batch("packed", torch.float32, rows))
    assert whole > 6 * largest[0]


def test_one_layout_serves_every_layer_of_a_forward():
    """Masks are built once for each window, not once for each layer."""
    layout, _ = batch("packed").packed
    model = packing_model("gemma2, norms, soft-capped, windowed")
    with torch.no_grad(), attend(model.base_model, layout) as keywords:
        model.base_model(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords)
    assert isinstance(layout, Packed)
    windows = {window for block in layout._blocks for window, _ in block._masks}
    assert windows == {None, 4}
    assert all(len(block._masks) <= 2 for block in layout._blocks)
