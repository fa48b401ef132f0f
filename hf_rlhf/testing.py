"""For authors of plugins: a conformance kit and test doubles.

    import pytest
    from hf_rlhf.testing import conformance

    @pytest.mark.parametrize("fact", conformance(MyEstimator(eps=1e-3)), ids=str)
    def test_conforms(fact):
        fact()

Each fact is one sentence of its axis' contract (see `hf_rlhf.axes`); calling it raises `AssertionError` saying what is
wrong. `scored`, `rollouts` and `tiny_policy` make small real inputs for tests of your own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_rlhf import facts, tensor_facts
from hf_rlhf.axes import AXES, Plugin, Reference, RewardSource, UpdateRule
from hf_rlhf.batch import Rollouts, Scored

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
SPECIAL = ["<pad>", "<eos>", "<unk>"]


# Test doubles


def scored(
    *,
    group_sizes: Sequence[int] = (4, 3, 1, 2),
    length: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **fields: Any,
) -> Scored:
    """A random `Scored` with every field: groups of these sizes, rows of up to `length` tokens, tool tokens in between.

    `fields` replace what was drawn, for instance `values=None` or `token_rewards=...`.
    """
    drawn = tensor_facts.as_scored(
        tensor_facts.draw_tensors(group_sizes=group_sizes, length=length, seed=seed, dtype=dtype)
    )
    return dataclasses.replace(drawn, **fields)


def rollouts(
    completions: Sequence[str] = ("5", "The answer is 5.", "", "#### 7"),
    *,
    prompts: Sequence[Any] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    group_size: int = 2,
) -> Rollouts:
    """Small `Rollouts` of these completions, `group_size` of them per prompt, in the tokens of `tiny_policy`.

    Without `columns` there is one, `answer`. Every other completion was cut off.
    """
    ids = [[len(SPECIAL) + CHARACTERS.index(c) for c in text] + [1] for text in completions]
    group_ids = [row // group_size for row in range(len(ids))]
    prompts = list(prompts or [f"2+3={'?' * (1 + group)}" for group in group_ids])
    return Rollouts(
        prompts=prompts,
        completions=list(completions),
        prompt_ids=[[len(SPECIAL) + CHARACTERS.index(c) for c in str(text) if c in CHARACTERS] for text in prompts],
        completion_ids=ids,
        masks=[[1] * len(row) for row in ids],
        finish_reasons=["length" if row % 2 else "stop" for row in range(len(ids))],
        columns={name: list(values) for name, values in (columns or {"answer": ["5"] * len(ids)}).items()},
        group_ids=group_ids,
    )


def tiny_policy(
    *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A two-layer Llama with random weights and a tokenizer with one token per ASCII character, in milliseconds."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return torch.nn.Module.to(model, dtype).eval(), tokenizer


# The kit


@dataclass(frozen=True)
class Fact:
    """One sentence of the contract about one plugin.

    Calling it raises AssertionError where the sentence is false, or what the plugin itself raises.
    """

    title: str
    holds: Callable[[], None]

    def __call__(self) -> None:
        self.holds()

    def __str__(self) -> str:
        return self.title


def conformance(
    plugin: Plugin,
    *,
    rollouts: Rollouts | None = None,
    policy: Callable[[], Any] | None = None,
    finite_differences: bool = True,
) -> list[Fact]:
    """The contract of the plugin's axis as facts to call; nothing is checked before.

    plugin: any plugin with its settings; one that needs `setup` must have been set up.
    rollouts: for reward sources that read dataset columns, rows that have them.
    policy: for references, makes a fresh policy (a model), for instance one with an adapter.
    finite_differences: False for a loss or KL estimator that stops gradients on purpose.
    Critics and rollout engines have only the facts of every plugin.
    """
    axis = next((key for key, base in AXES.items() if isinstance(plugin, base)), None)
    if axis is None:
        raise TypeError(f"{type(plugin).__name__} is no plugin: it subclasses no class of hf_rlhf.axes")
    claims = [*facts.of_every_plugin(plugin)]
    if isinstance(plugin, RewardSource):
        claims += facts.of_a_reward(plugin, rollouts or _rollouts())
    elif isinstance(plugin, Reference):
        claims += facts.of_a_reference(plugin, policy or (lambda: tiny_policy(dtype=torch.float64)[0]))
    elif isinstance(plugin, UpdateRule):
        claims += facts.of_an_update_rule(plugin, lambda: tiny_policy()[0])
    elif axis in tensor_facts.OUTPUTS:
        claims += tensor_facts.of_a_tensor_function(plugin, axis, finite_differences)
    name = f"{axis}.{getattr(plugin, 'name', type(plugin).__name__)}"
    return [Fact(f"{name}: {claim}", holds) for claim, holds in claims]


_rollouts = rollouts
