"""The embedded task for self-play: Nim with up to nine counters, and a small model that knows the moves.

Prompts read `7:`, moves are `1` to `3`, and the column `heap` holds the number. The model is warmed up on games of random legal
moves. Rows that are trained on are games against itself; held-out rows, with `perfect` in the column `opponent`, are
those that a perfect first player wins against any other.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.data.addition_task import WarmUp, demonstrations, fine_tune, made_once

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NIM = "builtin:nim"
"""Value of `model.path` and `dataset.path` for this model and these games."""
HEAPS = range(4, 10)
MOST = 3
ROUNDS = 40
"""Training rows of each heap."""
WARM_UP = WarmUp(layers=2, hidden_size=64, intermediate_size=192, target=0.31)


def nim_dataset() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return games in a fixed random order: 240 training rows and 28 held-out ones."""
    train = [{"prompt": f"{heap}:", "heap": str(heap), "opponent": "policy"} for heap in HEAPS] * ROUNDS
    random.Random("nim").shuffle(train)
    won = [heap for heap in HEAPS if heap % (MOST + 1)]
    return train, [{"prompt": f"{heap}:", "heap": str(heap), "opponent": "perfect"} for heap in won] * 7


def nim_model() -> Path:
    """Return the folder of the warmed-up model and its tokenizer, making them if they are not cached."""
    return made_once("nim", WARM_UP, _warm_up)


def _warm_up(tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Fine-tune until the legal first moves have probability `target`, which is 1/3 where every sample is one of them."""
    import torch

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        player = random.Random(int(torch.randint(2**31, (), generator=generator)))
        return demonstrations(tokenizer, [_moves(player) for _ in range(WARM_UP.batch_size)])

    first = [[(f"{heap}:", 0), (str(taken), 1)] for heap in HEAPS for taken in range(1, MOST + 1)]
    return fine_tune("nim", WARM_UP, tokenizer, draw, demonstrations(tokenizer, first))


def _moves(player: random.Random) -> list[tuple[str, int]]:
    """Return the texts of one side of a game, each with 1 if the policy says it."""
    heap, texts = player.randint(1, HEAPS[-1]), []
    while heap > 0:
        taken = player.randint(1, min(MOST, heap))
        texts += [(f"{heap}:", 0), (str(taken), 1)]
        heap -= taken + player.randint(1, MOST)
    return texts
