"""Check that rewards can see the special tokens that they ask for, and that references read the policy's tokens."""

from __future__ import annotations

import re
from typing import Any

from hf_rlhf.axes import Reference
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.builtin_tasks import TASKS
from hf_rlhf.data.model_loading import ModelError, load_tokenizer
from hf_rlhf.registry.settings_schema import at_path


def tag_problems(algorithm: Algorithm, tokenizer: Any) -> list[str]:
    """Return what is hidden from rewards that ask for it, with the fix."""
    end = {tokenizer.eos_token}
    hidden = {*tokenizer.all_special_tokens, *(x.content for x in tokenizer.added_tokens_decoder.values() if x.special)}
    if not algorithm.rollout.skip_special_tokens:
        hidden &= end
    found = []
    for label, source in zip(algorithm.labels(), algorithm.rewards, strict=True):
        asked = " ".join(source.patterns())
        tags = {token for token in hidden if token in asked or re.escape(token) in asked}
        if tags:
            fix = (
                "set rollout.skip_special_tokens=false" if tags - end else "leave it out, for rewards never see the end"
            )
            found.append(
                f"rewards.{label} asks for {', '.join(sorted(tags))}, which can never arrive: special tokens of the tokenizer "
                f"are hidden from rewards. {fix.capitalize()}"
            )
    return found


def token_problems(algorithm: Algorithm, tokenizer: Any) -> list[str]:
    """Return why references cannot score the policy's tokens, with the fix."""
    return [
        f"{path}={plugin.name}: {at_path(path, plugin, problem)}"
        for path, plugin in algorithm.plugins()
        if isinstance(plugin, Reference)
        for problem in plugin.token_problems(tokenizer)
    ]


def tag_problems_by_name(algorithm: Algorithm, model: Model) -> list[str]:
    """Return `tag_problems` and `token_problems` with the tokenizer that the settings name; nothing if it is not on this
    machine."""
    asking = any(source.patterns() for source in algorithm.rewards) and model.path not in TASKS
    compared = any(
        isinstance(plugin, Reference) and type(plugin).token_problems is not Reference.token_problems
        for _, plugin in algorithm.plugins()
    )
    if not (asking or compared) or not (model.tokenizer or model.path):
        return []
    try:
        tokenizer = load_tokenizer(model, local_files_only=True)
    except ModelError:
        return []
    return tag_problems(algorithm, tokenizer) + token_problems(algorithm, tokenizer)
