"""The same work for two systems: a small Qwen2 model, its tokenizer, prompts of given lengths and lengths of completions.

Everything is a function of a `Line` and a seed, so that each system can recreate it in a separate process.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAD, EOS, BOS, UNKNOWN = range(4)
FIRST_WORD = 4
"""Ids of the vocabulary's words begin here."""
SHORTEST = 4
"""Shortest completion in tokens."""
MEAN_SHARE, SPREAD = 0.4, 0.75
"""Lognormal lengths: the mean as a share of the longest, the deviation of the logarithm."""
QUANTILES = 8


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table: a model, a rollout and what is learned from it."""

    name: str
    title: str = ""
    algorithm: str = "grpo"
    """grpo or rloo, each as TRL computes it by default."""
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 6
    intermediate: int = 1024
    heads: int = 8
    kv_heads: int = 4
    head_dim: int | None = None
    """Numbers in a head of a Qwen3; None: the model is a Qwen2, whose heads divide `hidden`."""
    prompts: int = 4
    """Prompts per rollout."""
    group: int = 8
    """Completions per prompt."""
    longest: int = 128
    """Longest completion in tokens, the end of sequence included."""
    lengths: str = "lognormal"
    """lognormal; quantiles: of the lognormal distribution, the same ones for every `QUANTILES` rows; full: the longest."""
    shortest_prompt: int = 16
    longest_prompt: int = 64
    epochs: int = 1
    """Optimizer steps per rollout, each over all rows."""
    beta: float = 0.0
    """Coefficient of the KL to a reference, in the loss (grpo) or in the reward (rloo); 0: no reference."""
    dead: float = 0.0
    """Share of the prompts whose completions all get the same reward."""
    rewards: int = 1
    """Reward functions."""
    kls: int = 1
    """KLs between which beta is divided; TRL has one."""
    filters: int = 0
    """Filters that keep every row; TRL has none."""

    @property
    def rows(self) -> int:
        """Completions per rollout."""
        return self.prompts * self.group

    @property
    def compared(self) -> str:
        """Compared part of a cycle: all of it, or its update for lines about rows without signal."""
        return "update" if self.dead else "cycle"

    @property
    def kv_width(self) -> int:
        """Numbers in one token's keys in one layer."""
        return (self.head_dim or self.hidden // self.heads) * self.kv_heads


# The model and its tokenizer


def make_model(line: Line, seed: int = 0) -> Any:
    """Create a Qwen2 or Qwen3 with tied embeddings in float32 and matrices scaled by 1.5: distributions are far from uniform."""
    import transformers

    family = "Qwen3" if line.head_dim else "Qwen2"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=line.vocabulary,
        hidden_size=line.hidden,
        intermediate_size=line.intermediate,
        num_hidden_layers=line.layers,
        num_attention_heads=line.heads,
        num_key_value_heads=line.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        **({"head_dim": line.head_dim} if line.head_dim else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(1.5)
    return model


def make_tokenizer(vocabulary: int) -> Any:
    """One word per id: w4, w5, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<unk>": UNKNOWN}
    words |= {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


# Prompts, completions and their lengths


def prompt_ids(line: Line, cycle: int, seed: int = 0) -> list[list[int]]:
    """Return the prompts of rollout number `cycle`."""
    draw = random.Random(f"prompts {seed} {cycle}")
    sizes = [draw.randint(line.shortest_prompt, line.longest_prompt) for _ in range(line.prompts)]
    return [[draw.randrange(FIRST_WORD, line.vocabulary) for _ in range(size)] for size in sizes]


def dataset(line: Line, cycles: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of `prompt` and `live`, which is 0 where all rewards of the group are to be equal."""
    dead = round(line.dead * line.prompts)
    return [
        {"prompt": " ".join(f"w{i}" for i in ids), "live": int(place >= dead)}
        for cycle in range(cycles)
        for place, ids in enumerate(prompt_ids(line, cycle, seed))
    ]


def forced_lengths(line: Line, cycle: int, seed: int = 0) -> Tensor:
    """(rows,) tokens of each completion of rollout number `cycle`, the end of sequence included."""
    if line.lengths == "full":
        return torch.full((line.rows,), line.longest)
    mean = torch.tensor(MEAN_SHARE * line.longest).log() - SPREAD**2 / 2
    if line.lengths == "quantiles":
        places = (torch.arange(line.rows) % QUANTILES + 0.5) / QUANTILES
        deviations = torch.special.ndtri(places)
    else:
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + cycle)
        deviations = torch.randn(line.rows, generator=generator)
    drawn = (mean + SPREAD * deviations).exp()
    return drawn.round().clamp(min(SHORTEST, line.longest), line.longest).long()


def script(line: Line, cycle: int, seed: int = 0) -> list[list[int]]:
    """Random completions of the forced lengths, each ending with the end of sequence."""
    draw = random.Random(f"script {seed} {cycle}")
    lengths = forced_lengths(line, cycle, seed).tolist()
    return [[draw.randrange(FIRST_WORD, line.vocabulary) for _ in range(n - 1)] + [EOS] for n in lengths]


def score(completion_ids: Sequence[Sequence[int]], live: Sequence[int]) -> list[float]:
    """Return a number between 0 and 1 that depends on every token; 0 for all of a group without signal."""
    return [on * (sum(ids) % 997) / 997 for ids, on in zip(completion_ids, live, strict=True)]


def scores(count: int) -> list[Any]:
    """`count` reward functions that differ in their names."""

    def numbered(i: int) -> Any:
        def function(completion_ids: Any, live: Any, **columns: Any) -> list[float]:
            return score(completion_ids, live)

        function.__name__ = f"score_{i}"
        return function

    return [numbered(i) for i in range(count)]
