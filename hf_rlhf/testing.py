"""Conformance kit and test doubles for authors of plugins.

    import pytest
    from hf_rlhf.testing import conformance

    @pytest.mark.parametrize("fact", conformance(MyEstimator(eps=1e-3)), ids=str)
    def test_conforms(fact):
        fact()

Each fact is one sentence of its axis' contract (see `hf_rlhf.axes`); calling it raises `AssertionError` if it is false.
`scored`, `rollouts` and `tiny_policy` make small real inputs for tests of your own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch

from hf_rlhf.axes import (
    Critic,
    Environment,
    KLController,
    OfflineTrainer,
    Pattern,
    Plugin,
    PromptSampler,
    Reference,
    RewardSource,
    RolloutEngine,
    TextTerm,
    UpdateRule,
    axis_of,
)
from hf_rlhf.batch import Prompt, Rollouts, Scored
from hf_rlhf.conformance import (
    common,
    environments,
    invariances,
    metrics,
    models,
    offline_trainers,
    patterns,
    rewards,
    rollout_engines,
    samplers,
    tensor_inputs,
)

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
    """Return a random `Scored` with every field: groups of these sizes, rows of up to `length` tokens, some tool tokens.

    `fields` replace drawn values, for instance `values=None` or `token_rewards=...`.
    """
    drawn = tensor_inputs.as_scored(
        tensor_inputs.draw_tensors(group_sizes=group_sizes, length=length, seed=seed, dtype=dtype)
    )
    return dataclasses.replace(drawn, **fields)


def rollouts(
    completions: Sequence[str] = ("5", "The answer is 5.", "", "#### 7"),
    *,
    prompts: Sequence[Any] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    group_size: int = 2,
) -> Rollouts:
    """Return small `Rollouts` of these completions, `group_size` per prompt, in the tokens of `tiny_policy`.

    The only column is `answer` by default. Every other completion is truncated.
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
    """Return a two-layer Llama with random weights and a tokenizer with one token per ASCII character, in milliseconds."""
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

    Calling it raises AssertionError if the sentence is false, or what the plugin itself raises. It raises
    `unittest.SkipTest`, which pytest reports as a skip, if an earlier fact is false and this one has no meaning.
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
    prompts: Sequence[Prompt] | None = None,
    policy: Callable[[], Any] | None = None,
    finite_differences: bool | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> list[Fact]:
    """Return the contract of the plugin's axis as facts to call; nothing is checked before.

    plugin: any plugin with its settings; one that needs `setup` must have been set up.
    rollouts: for reward sources that read dataset columns, rows that have them; by default each column that `columns()`
        names holds the text 5.
    prompts: for rollout engines and environments that read dataset columns, prompts that have them; by default likewise.
    policy: for rollout engines, critics, references and update rules, makes a fresh policy (a model).
    finite_differences: whether the gradient of a loss or KL estimator must equal finite differences; by default it must
        unless the plugin sets `stops_gradient = True`.
    rows: for offline trainers, at least eight rows of a dataset; by default those of `builtin:addition` of its kind.
    """
    axis = axis_of(type(plugin))
    if not axis:
        raise TypeError(f"{type(plugin).__name__} is not a plugin: it subclasses no class of hf_rlhf.axes")
    own_metrics = dict.fromkeys(invariances.metric_names(plugin), 0.25)
    history = [common.FIRST_ROLLOUT, {**common.LATER_ROLLOUT, **own_metrics}]
    checks = [*common.plugin_checks(plugin, history), *metrics.metric_checks(plugin, axis, history)]
    make = policy or (lambda: _policy(plugin.needs))
    if isinstance(plugin, RewardSource):
        checks += rewards.reward_checks(plugin, rollouts or _rollouts_for(plugin))
    elif isinstance(plugin, RolloutEngine):
        checks += rollout_engines.rollout_engine_checks(plugin, make, tiny_policy()[1], prompts or _prompts(plugin))
    elif isinstance(plugin, Environment):
        checks += environments.environment_checks(plugin, make, tiny_policy()[1], prompts or _prompts(plugin))
    elif isinstance(plugin, Critic):
        checks += models.critic_checks(plugin, make)
    elif isinstance(plugin, Reference):
        checks += models.reference_checks(plugin, make)
    elif isinstance(plugin, UpdateRule):
        checks += models.update_rule_checks(plugin, make)
    elif isinstance(plugin, KLController):
        checks += common.controller_checks(plugin)
    elif isinstance(plugin, OfflineTrainer):
        checks += offline_trainers.offline_trainer_checks(plugin, tiny_policy(), rows)
    elif isinstance(plugin, PromptSampler):
        checks += samplers.sampler_checks(plugin)
    elif isinstance(plugin, Pattern):
        checks += patterns.pattern_checks(plugin)
    elif axis in tensor_inputs.OUTPUTS:
        checks += invariances.tensor_function_checks(plugin, axis, finite_differences, history)
    if isinstance(plugin, TextTerm):
        checks += models.text_term_checks(plugin)
    name = f"{axis}.{getattr(plugin, 'name', type(plugin).__name__)}"
    return [Fact(f"{name}: {claim}", holds) for claim, holds in checks]


_rollouts = rollouts


def _rollouts_for(plugin: RewardSource) -> Rollouts:
    """Return small `Rollouts` with the columns that the source reads, the text 5 in each row, and those of episodes."""
    names = {"answer", *getattr(plugin, "columns", set)()}
    episodes: dict[str, list[Any]] = {
        "episode/reward": [1.0, 0.0, None, 0.5],
        "episode/turn_rewards": [None] * 4,
        "episode/turn_ends": [[0]] * 4,
    }
    return _rollouts(columns={**{name: ["5"] * 4 for name in sorted(names)}, **episodes})


def _prompts(plugin: RolloutEngine | Environment) -> list[Prompt]:
    """Return two prompts of different length, with the completions that `rollout=scripted` reads, and the text 5 in each other
    column that the plugin reads."""
    others = dict.fromkeys(sorted({"answer", *getattr(plugin, "columns", set)()}), "5")
    texts = {"2+3=": ["5", "The answer is 5."], "What is 17+4?": ["21", "#### 7"]}
    return [
        Prompt(
            ids=[len(SPECIAL) + CHARACTERS.index(c) for c in text],
            prompt=text,
            columns={**others, "completions": completions},
        )
        for text, completions in texts.items()
    ]


def _policy(needs: frozenset[str]) -> Any:
    """Return a fresh tiny policy with what the plugin needs of it."""
    model: Any = tiny_policy(dtype=torch.float64)[0]
    if "double_backward" in needs:
        model.set_attn_implementation("eager")
    if "adapter" not in needs:
        return model
    try:
        import peft
    except ImportError:
        raise SkipTest("skipped: peft is not installed, and it needs a policy with an adapter") from None
    with torch.random.fork_rng(devices=[]):
        return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).eval()
