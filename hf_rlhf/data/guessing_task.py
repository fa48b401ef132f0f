"""The embedded task for hidden state: a number from 1 to 7 to guess, and a small model that half listens to the answers.

Every prompt reads `1-7?`, and the number is hidden in the column `secret`: all that a policy can learn is to search. A guess is
answered by `>` or `<`. The model is warmed up on games of a player of whose guesses half are any number, and the others any that
fits the answers. A policy that halves what is left finds every number in three guesses.
"""

from __future__ import annotations

import random
from collections.abc import Callable
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
WARM_UP = WarmUp(layers=2, hidden_size=64, intermediate_size=192, wrong=0.5, target=0.4)


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
    """Fine-tune until the one number that is left after `4>6<` and the like has probability `target`."""
    import torch

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        player = random.Random(int(torch.randint(2**31, (), generator=generator)))

        def guess(low: int, high: int) -> int:
            return player.choice(NUMBERS) if player.random() < WARM_UP.wrong else player.randint(low, high)

        return demonstrations(tokenizer, [_game(player.choice(NUMBERS), guess) for _ in range(WARM_UP.batch_size)])

    halved = [_game(secret, lambda low, high: (low + high) // 2) for secret in NUMBERS[::2]]
    settled = [[*((text, 0) for text, _ in game[:-1]), game[-1]] for game in halved]
    return fine_tune("guessing", WARM_UP, tokenizer, draw, demonstrations(tokenizer, settled))


def _game(secret: int, guess: Callable[[int, int], int]) -> list[tuple[str, int]]:
    """Return the texts of a game, each with 1 if the policy says it. `guess` gets the least and the greatest number that fit."""
    low, high, texts = NUMBERS[0], NUMBERS[-1], [(PROMPT, 0)]
    for turn in range(GUESSES):
        number = guess(low, high)
        texts.append((str(number), 1))
        if number == secret or turn == GUESSES - 1:
            break
        texts.append((">" if number < secret else "<", 0))
        low, high = (max(low, number + 1), high) if number < secret else (low, min(high, number - 1))
    return texts
