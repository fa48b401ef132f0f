"""Token log-probs are those of a plain forward of each row alone, whatever stands beside it in the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.reference import ReferencePolicy
from hf_rlhf.modeling.token_batch import Attention, TokenBatch, packs
from hf_rlhf.testing import tiny_policy
from hf_rlhf_plugins.critic._modules import TrunkHead
from tests.helpers import runs

VOCAB, PAD = 64, 0
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": PAD}
GPT2 |= {"attn_pdrop": 0.0}


def models() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)),
        "qwen2, tied": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, tie_word_embeddings=True)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, head_dim=8)),
        "gemma, norms": lambda: t.GemmaForCausalLM(t.GemmaConfig(**SMALL, head_dim=8)),
        "gemma2, norms, soft-capped, windowed": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**SMALL, head_dim=8, sliding_window=4, final_logit_softcapping=2.0)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1)),
        "mistral, windowed": lambda: t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=4)),
        "mixtral, router": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
        ),
        "qwen3 moe, router": lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
    }


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
COMPLETIONS = [[20, 21, 22, 23, 24, 1], [30, 31], [40, 41, 42, 43, 44, 45, 46, 47, 48], [1]]
MASKS = [[1, 1, 0, 0, 1, 1], [1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 1], [1]]


ROUNDED = {"gemma, norms", "gemma2, norms, soft-capped, windowed", "mixtral, router", "qwen3 moe, router"}
"""What stands after the comma is computed in float32 by transformers, also in a float64 model."""


def tolerance(name: str, exact: float) -> float:
    return 2e-6 if name in ROUNDED else exact


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model whose distributions are far from flat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models()[name]()
    if "mix" in name or "moe" in name:
        model.set_experts_implementation("eager")  # the grouped product has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return torch.nn.Module.to(model, dtype).eval()


def mask_of(masks: list[list[int]], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in masks], batch_first=True)


def forward(
    module: ActorCritic, which: list[int] | None = None, pad: int = PAD, attention: Attention = "packed", **asked: Any
) -> Any:
    """The module on these rows in one batch."""
    which = list(range(len(PROMPTS))) if which is None else which
    mask = mask_of([MASKS[i] for i in which])
    batch = TokenBatch([PROMPTS[i] for i in which], [COMPLETIONS[i] for i in which], mask, pad, attention)
    return module(batch, **asked)


def plain(model: Any, temperature: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies of each row's completion, row by row, without padding, by the textbook."""
    logps, entropies = [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        distribution = torch.distributions.Categorical(logits=logits / temperature)
        logps.append(distribution.log_prob(torch.tensor(completion)))
        entropies.append(distribution.entropy())
    return logps, entropies


def assert_rows(got: Tensor, want: list[Tensor], atol: float) -> None:
    mask = mask_of(MASKS, got.dtype)
    wanted = torch.nn.utils.rnn.pad_sequence(list(want), batch_first=True).to(got.dtype) * mask
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("attention", ["packed", "flex", "padded"])
@pytest.mark.parametrize("name", models())
def test_log_probs_and_entropy_are_those_of_each_row_alone(name, attention, dtype, atol, temperature):
    model = build(name, dtype)
    with torch.no_grad():
        found = forward(ActorCritic(model, None, temperature), entropy=True, attention=attention)
        logps, entropies = plain(model, temperature)
    assert found["logps"].dtype == dtype
    assert_rows(found["logps"], logps, tolerance(name, atol))
    assert_rows(found["entropy"], entropies, tolerance(name, atol))
    assert (found["logps"] < -1e-3).any()


@pytest.mark.parametrize("name", models())
def test_every_architecture_takes_packed_rows(name):
    assert packs(build(name).base_model)


@pytest.mark.parametrize("name", models())
def test_padding_and_neighbours_change_nothing(name):
    atol = tolerance(name, 1e-12)
    module = ActorCritic(build(name), None, 1.0)
    with torch.no_grad():
        whole = forward(module)["logps"]
        for changed in (forward(module, attention="padded"), forward(module, pad=33, attention="padded")):
            torch.testing.assert_close(changed["logps"], whole, rtol=0, atol=atol)
        backwards = forward(module, [3, 2, 1, 0])["logps"]
        torch.testing.assert_close(backwards.flip(0), whole, rtol=0, atol=atol)
        for row, completion in enumerate(COMPLETIONS):
            alone = forward(module, [row])["logps"]
            torch.testing.assert_close(alone[0], whole[row, : len(completion)], rtol=0, atol=atol)


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("name", models())
def test_gradients_are_those_of_the_plain_forward(name, attention):
    model = build(name)
    mask = mask_of(MASKS)
    weights = torch.linspace(-1, 1, mask.numel(), dtype=torch.float64).view_as(mask) * mask

    def gradient(logps: Tensor, entropy: Tensor) -> Tensor:
        model.zero_grad()
        (logps * weights + 0.3 * entropy * weights**2).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    found = forward(ActorCritic(model, None, 0.8), entropy=True, attention=attention)
    ours = gradient(found["logps"], found["entropy"])
    logps, entropies = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in plain(model, 0.8))
    theirs = gradient(logps, entropies)
    assert ours.norm() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance(name, 1e-10) * float(theirs.abs().max()))


def test_positions_are_absolute_from_the_first_token_of_the_prompt():
    """GPT-2 learns its positions: a row that is padded on the left would see others."""
    model = build("gpt2")
    with torch.no_grad():
        right = forward(ActorCritic(model, None, 1.0))["logps"]
        shifted = model(input_ids=torch.tensor([[PAD, *PROMPTS[1], *COMPLETIONS[1]]])).logits[0, 1:-1]
    moved = shifted.log_softmax(-1).gather(1, torch.tensor(COMPLETIONS[1])[:, None])[:, 0]
    assert (right[1, :2] - moved).abs().max() > 1e-3


def test_the_batch_names_the_token_before_each_sampled_one():
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    batch = TokenBatch([[7, 8], [9]], [[3, 4, 5], [6, 2]], mask, pad=0)
    assert batch.rows.tolist() == [0, 0, 1, 1]
    assert batch.columns.tolist() == [0, 2, 0, 1]
    assert batch.targets.tolist() == [3, 5, 6, 2]
    input_ids, before = batch.padded
    assert input_ids.tolist() == [[7, 8, 3, 4, 5], [9, 6, 2, 0, 0]]
    assert before.tolist() == [1, 3, 5, 6]


def test_packed_rows_hold_each_prompt_once_and_nothing_behind_the_last_state_that_is_read():
    mask = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    batch = TokenBatch([[7, 8], [9], [6], [7, 8]], [[3, 4, 5], [6, 2, 2], [1], [1, 2]], mask, pad=0)
    layout, before = batch.packed
    assert layout.input_ids.tolist() == [[7, 8, 3, 4, 1, 9]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 2, 0]]
    assert before.tolist() == [1, 3, 5, 1, 4]


def test_tool_tokens_are_read_and_get_no_log_prob():
    module = ActorCritic(build("llama"), None, 1.0)
    mask = torch.tensor([[1.0, 0.0, 1.0]]).double()

    def logps(tool: int) -> Tensor:
        batch = TokenBatch([[5, 6]], [[20, tool, 22]], mask, PAD)
        return module(batch)["logps"][0]

    with torch.no_grad():
        one, other = logps(21), logps(50)
    assert one[1] == other[1] == 0
    assert one[0] == other[0], "a later token cannot matter"
    assert one[2] != other[2], "a tool's answer is part of the state"


def test_rows_without_a_sampled_token_give_zeros_and_a_gradient_of_zero():
    model = build("llama")
    critic = TrunkHead(model, 1.0)
    batch = TokenBatch([[PAD]], [[PAD]], torch.zeros(1, 1), PAD)
    found = ActorCritic(model, critic, 1.0)(batch, entropy=True, values=True)
    assert all(x.tolist() == [[0.0]] for x in found.values())
    sum(x.sum() for x in found.values()).backward()
    gradients = [p.grad for p in [*model.parameters(), *critic.parameters()]]
    assert all(g is not None and bool((g == 0).all()) for g in gradients), "every process takes part in the backward"


def test_half_precision_logits_are_made_float32_before_the_softmax():
    module = ActorCritic(build("llama", torch.bfloat16), None, 1.0)
    with torch.no_grad():
        found = forward(module)["logps"]
        logits = module.policy(input_ids=torch.tensor([[*PROMPTS[3], *COMPLETIONS[3]]])).logits[0, 1].float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[3, 0], logits.log_softmax(-1)[1], rtol=0, atol=0.02)


# Values


@pytest.mark.proves("critic.value_head", how="closed form", tolerance="1e-10")
@pytest.mark.parametrize("name", models())
def test_a_value_is_read_off_the_state_before_its_token(name):
    """With a hand-set head: the value is the sum of the hidden state that the head of the language model sees there."""
    model = build(name)
    critic = TrunkHead(model, 1.0)
    with torch.no_grad():
        critic.head.weight.fill_(1.0)
        critic.head.bias.fill_(0.25)
        found = forward(ActorCritic(model, critic, 1.0), values=True, logps=False)
        want = []
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            states = model.base_model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state
            want.append(states[0, len(prompt) - 1 : -1].sum(-1) + 0.25)
    assert set(found) == {"values"}
    assert_rows(found["values"], want, tolerance(name, 1e-10))


def test_a_value_does_not_see_its_own_token():
    model = build("llama")
    critic = TrunkHead(model, 1.0)
    with torch.no_grad():
        critic.head.weight.fill_(1.0)

    def values(last: int) -> Tensor:
        mask = torch.ones(1, 2, dtype=torch.float64)
        batch = TokenBatch([[5, 6]], [[20, last]], mask, PAD)
        return ActorCritic(model, critic, 1.0)(batch, values=True)["values"][0]

    assert torch.equal(values(21), values(50))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_trunk_gradient_scales_what_the_values_send_into_the_trunk(share):
    def gradients(trunk_gradient: float) -> tuple[Tensor, Tensor]:
        model = build("llama")
        critic = TrunkHead(model, trunk_gradient)
        with torch.no_grad():
            critic.head.weight.fill_(0.1)
        found = forward(ActorCritic(model, critic, 1.0), values=True)
        (found["values"] ** 2).sum().backward()
        trunk = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return torch.cat([g.flatten() for g in trunk]), critic.head.weight.grad

    trunk, head = gradients(share)
    full_trunk, full_head = gradients(1.0)
    assert full_trunk.norm() > 0
    torch.testing.assert_close(trunk, share * full_trunk, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(head, full_head)


def test_values_without_a_critic_are_an_error():
    with pytest.raises(ValueError, match="needs a critic"):
        forward(ActorCritic(build("llama"), None, 1.0), values=True)


# Adapters


def test_the_reference_of_an_adapter_is_the_base_model():
    from peft import get_peft_model

    from hf_rlhf import load_plugin

    base, _ = tiny_policy(dtype=torch.float64)
    with torch.no_grad():
        want = forward(ActorCritic(base, None, 0.9))["logps"]
    adapted = get_peft_model(base, runs.adapter())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
        moved = forward(ActorCritic(adapted, None, 0.9))["logps"]
        reference = load_plugin("reference", "adapter_off")
        mask = mask_of(MASKS)
        batch = TokenBatch(PROMPTS, COMPLETIONS, mask, PAD)
        adapted.train()
        found = ReferencePolicy(None, adapted, reference.active, 0.9)(batch)
        assert adapted.training, "the policy's mode is put back"
        adapted.eval()
        again = forward(ActorCritic(adapted, None, 0.9))["logps"]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    assert (moved - want).abs().max() > 1e-3
    assert torch.equal(again, moved), "the adapter is on again"


def test_values_on_the_trunk_of_an_adapter_see_its_states():
    from peft import get_peft_model

    base, _ = tiny_policy(dtype=torch.float64)
    critic = TrunkHead(base, 1.0)
    with torch.no_grad():
        critic.head.weight.fill_(1.0)
        plain_values = forward(ActorCritic(base, critic, 1.0), values=True)["values"]
        adapted = get_peft_model(base, runs.adapter())
        at_zero = forward(ActorCritic(adapted, critic, 1.0), values=True)["values"]
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
        moved = forward(ActorCritic(adapted, critic, 1.0), values=True)["values"]
    torch.testing.assert_close(at_zero, plain_values, rtol=0, atol=1e-12)
    assert (moved - plain_values).abs().max() > 1e-3
