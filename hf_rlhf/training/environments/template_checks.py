"""Checks that the chat template suits the environments: it keeps earlier turns, and its tool calls can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.chat import ChatError
from hf_rlhf.data.history import check_calls, check_history

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_problems(algorithm: Algorithm, tokenizer: PreTrainedTokenizerBase, prompts: Any) -> list[str]:
    """Return reasons why the chat template does not suit the environments; none for prompts that are plain text."""
    if not algorithm.environment or isinstance(next(iter(prompts)).prompt, str):
        return []
    problems = []
    for environment in algorithm.environment:
        schemas = environment.tool_schemas() or None
        try:
            if schemas:
                check_calls(tokenizer, schemas)
            if environment.history == "extend":
                check_history(tokenizer, environment.followers, schemas)
        except ChatError as error:
            problems.append(f"environment={environment.name}: {error}")
    return problems
