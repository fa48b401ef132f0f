"""Checks that the chat template suits the environments: it keeps earlier turns, and its tool calls can be read."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.chat import ChatError, Conversation, chat_of
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


def tool_tokens(algorithm: Algorithm, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens that the chat template takes to show an environment's tools; 0 where it cannot."""
    conversation = Conversation([{"role": "user", "content": "x"}], "answer")

    def size(schemas: list[dict[str, Any]] | None) -> int:
        text = chat_of(tokenizer, conversation, tools=schemas).text(conversation)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    offered = [schemas for environment in algorithm.environment if (schemas := environment.tool_schemas())]
    with suppress(ChatError):  # `template_problems` says why
        return max((size(schemas) - size(None) for schemas in offered), default=0)
    return 0
