"""KL-regularised reward has the optimum pi* = ref e^{r / beta} / Z, and real runs arrive there from samples alone.

The task has 13 completions, all of them enumerated, so that a run's policy is compared with the exact optimum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainingArguments

from hf_rlhf import RLHFTrainer
from hf_rlhf.config.recipe import resolve
from hf_rlhf.config.training_arguments import DEFAULTS

LETTERS = "abc"
TEXTS = ["", *LETTERS, *(one + two for one in LETTERS for two in LETTERS)]
"""Every completion of up to two tokens: ended at once, after a letter, or cut off after two."""
REWARDS = dict(
    zip(TEXTS, torch.randn(13, generator=torch.Generator().manual_seed(3)).clamp(-1, 1).tolist(), strict=True)
)
BETA = 0.5


def rewarded(completions: list[str], **columns: Any) -> list[float]:
    """The reward of each completion."""
    return [REWARDS[text] for text in completions]


def letters_policy() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A small Llama over the end of sequence and three letters, far from uniform."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = Tokenizer(models.WordLevel({"<eos>": 0, **{letter: i for i, letter in enumerate(LETTERS, 1)}}))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokens.decoder = decoders.Fuse()
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>")


def probabilities(policy: Any) -> Tensor:
    """(13,) of each text of TEXTS after the prompt `ab`, in float64."""
    with torch.no_grad():
        first = policy(torch.tensor([[1, 2]])).logits[0, -1].double().softmax(-1)
        second = policy(torch.tensor([[1, 2, 1], [1, 2, 2], [1, 2, 3]])).logits[:, -1].double().softmax(-1)
    ended = first[1:] * second[:, 0]
    return torch.cat([first[:1], ended, (first[1:, None] * second[:, 1:]).flatten()])


def optimum(reference: Tensor) -> Tensor:
    """ref e^{r / beta} / Z."""
    tilted = reference * torch.tensor([REWARDS[text] for text in TEXTS], dtype=torch.float64).div(BETA).exp()
    return tilted / tilted.sum()


def regularised_run(folder: Path, kl: dict[str, Any], steps: int = 100) -> tuple[Tensor, Tensor]:
    """The probabilities before and after a run on sampled completions."""
    policy, tokenizer = letters_policy()
    before = probabilities(policy)
    recipe = resolve(
        {
            "rollout": {"use": "generate", "prompts": 2, "num_generations": 128, "max_new_tokens": 2},
            "rewards": [{"use": "function", "function": rewarded}],
            "kl": [{"beta": BETA, **kl}],
            "advantages": {"use": "leave_one_out"},
            "policy_loss": {"use": "reinforce"},
            "aggregation": {"use": "seq_mean_token_sum"},
        }
    )
    args = TrainingArguments(
        str(folder),
        **{**DEFAULTS, "logging_steps": steps, "per_device_train_batch_size": 256},
        use_cpu=True,
        max_steps=steps,
        learning_rate=5e-3,
    )
    trainer = RLHFTrainer(policy, recipe, args, train_dataset=[{"prompt": "ab"}] * 8, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.close()
    return before, probabilities(policy.eval())


def gap(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats."""
    return (p * (p / q).log()).sum().item()


ARRIVE = {
    "in_reward k1": {"use": "in_reward", "estimator": "k1"},
    "in_loss k2, sequence": {"use": "in_loss", "estimator": "k2", "level": "sequence"},
}
ELSEWHERE = {
    "in_loss k2, token": {"use": "in_loss", "estimator": "k2"},
    "in_loss k3, token": {"use": "in_loss", "estimator": "k3"},
    "in_reward k3": {"use": "in_reward", "estimator": "k3"},
}


@pytest.mark.proves("kl.in_reward", "kl.in_loss", how="end to end", tolerance="0.002 nats")
@pytest.mark.parametrize("kl", ARRIVE.values(), ids=ARRIVE)
def test_a_run_on_samples_arrives_at_the_optimum_of_the_regularised_reward(kl, tmp_path):
    before, after = regularised_run(tmp_path, kl)
    assert gap(before, optimum(before)) > 0.5
    assert gap(after, optimum(before)) < 0.002


@pytest.mark.parametrize("kl", ELSEWHERE.values(), ids=ELSEWHERE)
def test_penalties_with_another_gradient_arrive_elsewhere(kl, tmp_path):
    before, after = regularised_run(tmp_path, kl)
    assert gap(after, optimum(before)) > 0.05
