"""The embedded task for hidden state: a number from 1 to 7 to guess, and a small model that knows how to name one.

Every prompt reads `1-7?`, and the number is hidden in the column `secret`: all that a policy can learn is to search. A guess is
answered by `>` or `<`. The model is warmed up on games of a player who does not listen, so that its samples find the number in
three guesses in a bit over a third of the games; a policy that halves what is left always does.
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

GUESSING = "builtin:guessing"
"""Value of `model.path` and `dataset.path` for this model and these games."""
NUMBERS = range(1, 8)
PROMPT = "1-7?"
GUESSES = 3
ROUNDS = 40
"""Training rows of each number; the held-out rows are a tenth of that."""
WARM_UP = WarmUp(target=0.135)


def guessing_dataset() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return games in a fixed random order, 280 training rows and 28 held out. Their prompts are equal, so neither hints."""
    rows = [{"prompt": PROMPT, "secret": str(secret)} for secret in NUMBERS]
    train = rows * ROUNDS
    random.Random("guessing").shuffle(train)
    return train, rows * (ROUNDS // 10)


def guessing_model() -> Path:
    """Return the folder of the warmed-up model and its tokenizer, making them if they are not cached."""
    return made_once("guessing", WARM_UP, _warm_up)


def _warm_up(tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Fine-tune until the first guesses have probability `target`, which is 1/7 where every sample is one of them."""
    import torch

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(NUMBERS[0], NUMBERS[-1] + 1, (WARM_UP.batch_size, 1 + GUESSES), generator=generator)
        return demonstrations(tokenizer, [_game(secret, guesses) for secret, *guesses in drawn.tolist()])

    first = demonstrations(tokenizer, [[(PROMPT, 0), (str(number), 1)] for number in NUMBERS])
    return fine_tune("guessing", WARM_UP, tokenizer, draw, first)


def _game(secret: int, guesses: list[int]) -> list[tuple[str, int]]:
    """Return the texts of a game, each with 1 if the policy says it."""
    texts = [(PROMPT, 0)]
    for guess in guesses:
        texts.append((str(guess), 1))
        if guess == secret:
            break
        texts.append((">" if guess < secret else "<", 0))
    return texts
