"""Set up what samples and scores, for a run and for the evaluation of a saved model, and close it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import Context, Plugin
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.base import nested_of
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.modeling.sharding import WholeModel
from hf_rlhf.training.environments.workers import close_here, set_up_here
from hf_rlhf.training.environments.workers import elsewhere as in_their_processes

if TYPE_CHECKING:
    from transformers import TrainingArguments


def policy_of(
    model: Any, tokenizer: Any, algorithm: Algorithm, args: TrainingArguments, whole: WholeModel | None = None
) -> Policy:
    """Return the policy as rollout engines get it. `whole`: its twin, if it is sharded."""
    wants = algorithm.compares_sampler or algorithm.samples_old_logps
    given = model if whole is None else whole.model
    return Policy(model=given, tokenizer=tokenizer, device=args.device, wants_logps=wants, whole=whole)


def context_of(
    model: Any, tokenizer: Any, settings: Model, args: TrainingArguments, longest: int | None = None
) -> Context:
    """Return what plugins get in `setup`. `model`: the policy's; `settings`: the recipe's `model`; `longest`: prompt, in
    tokens."""
    return Context(
        device=args.device,
        tokenizer=tokenizer,
        policy=model,
        seed=args.seed,
        process_index=args.process_index,
        num_processes=args.world_size,
        chat_template_kwargs=settings.chat_template_kwargs,
        prompt_tokens=longest,
    )


def set_up(plugin: Plugin, algorithm: Algorithm, context: Context, autocast: AbstractContextManager[None]) -> None:
    """Call `setup` of a plugin, that of the rollout engine in `autocast`."""
    with autocast if plugin is algorithm.rollout else nullcontext():
        set_up_here(plugin, context)


def close_plugins(algorithm: Algorithm) -> None:
    """Call `close` of every plugin except the reward sources, which the scorer closes."""
    for plugin in plugins_here(algorithm, algorithm.plugins()):
        close_here(plugin)


def plugins_here(algorithm: Algorithm, plugins: Iterable[tuple[str, Plugin]]) -> Iterator[Plugin]:
    """Yield those of `plugins` that this process sets up: not the reward sources, but what is nested in them."""
    own = {id(source) for source in algorithm.rewards}
    elsewhere = {
        id(x) for source in algorithm.rewards if source.workers in ("processes", "ray") for x in nested_of(source)
    } | in_their_processes(algorithm.environment)
    for _, plugin in plugins:
        if id(plugin) not in own | elsewhere:
            yield plugin
