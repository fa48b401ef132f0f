"""The embedded task for tools: two-digit multiplication, and a small model that seldom asks its calculator.

Prompts read `37*58=`, answers `2146`. The model is warmed up on demonstrations of which a fifth call the tool,
`[calc(37*58)]`, and copy its result; the others are random numbers at once. It calls correctly when it does, and its samples are
right in about a sixth of the episodes: what is left to learn is to use the tool. 512 of the 8,100 problems are held out.
"""

from __future__ import annotations

import ast
import operator
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.data.addition_task import HELD_OUT, WarmUp, demonstrations, fine_tune, made_once

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CALCULATOR = "builtin:calculator"
"""Value of `model.path` and `dataset.path` for this model and these problems."""
PRODUCTS = range(100, 9802)
WARM_UP = WarmUp(wrong=0.8, target=0.16, initializer_range=0.06)
_OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calc(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers with +, -, *, / and parentheses.
    """
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    return str(int(value) if value == int(value) else value)


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return float(_OPERATIONS[type(op)](_value(left), _value(right)))
    raise ValueError("must be numbers with +, -, *, / and parentheses")


def calculator_dataset() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return all problems a * b with a, b in 10..99 in a fixed random order: 7,588 training rows and 512 held out."""
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random("calculator").shuffle(problems)
    rows = [{"prompt": f"{a}*{b}=", "answer": str(a * b)} for a, b in problems]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def calculator_model() -> Path:
    """Return the folder of the warmed-up model and its tokenizer, making them if they are not cached."""
    return made_once("calculator", WARM_UP, _warm_up)


def _warm_up(tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Fine-tune until right episodes with a call have probability `target`."""
    import torch

    rows, _ = calculator_dataset()

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        size = (WARM_UP.batch_size,)
        chosen = torch.randint(len(rows), size, generator=generator).tolist()
        guesses = torch.randint(PRODUCTS.start, PRODUCTS.stop, size, generator=generator).tolist()
        calls = (torch.rand(size, generator=generator) >= WARM_UP.wrong).tolist()
        given = zip(chosen, guesses, calls, strict=True)
        return demonstrations(
            tokenizer,
            [_with_call(rows[i]) if call else [(rows[i]["prompt"], 0), (str(guess), 1)] for i, guess, call in given],
        )

    fixed = demonstrations(tokenizer, map(_with_call, rows[: WARM_UP.batch_size * 2]))
    return fine_tune("calculator", WARM_UP, tokenizer, draw, fixed)


def _with_call(row: dict[str, str]) -> list[tuple[str, int]]:
    call = f"[calc({row['prompt'].removesuffix('=')})]"
    return [(row["prompt"], 0), (call, 1), (f"\n{row['answer']}\n", 0), (row["answer"], 1)]
