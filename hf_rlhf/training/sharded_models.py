"""Sharding of the models of a run before the optimizer exists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.modeling.policy import ActorCritic, why_not_packed
from hf_rlhf.modeling.sharding import WholeModel
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training.micro_batches import choose_attention
from hf_rlhf.training.parallel import Parallel
from hf_rlhf.training.references import References


def shard_models(
    parallel: Parallel, algorithm: Algorithm, actor_critic: ActorCritic, references: References
) -> WholeModel | None:
    """Shard the models of a run as its arguments say, and return what gathers the policy; None where nothing is sharded.

    What is found by running a model is found before: which layouts it supports, whether it is a trunk with a head.
    """
    if parallel.sharding is None:
        return None
    _check_dtypes(actor_critic)
    policy = actor_critic.policy
    with parallel.accelerator.autocast():
        attention = choose_attention(algorithm, policy)
        for scorer in references.scorers.values():
            if attention != "padded" and scorer.own is not None:
                why_not_packed(scorer.own, attention)
    whole = WholeModel(policy)
    parallel.shard(actor_critic)
    roots: dict[int, ActorCritic] = {}
    for scorer in references.scorers.values():
        if scorer.own is None:
            scorer.module = actor_critic
        elif id(scorer.own) in roots:
            scorer.module = roots[id(scorer.own)]
        else:
            roots[id(scorer.own)] = scorer.module
            parallel.shard(scorer.module)
    return whole


def shard_plain(parallel: Parallel, model: Any, reference: Any = None) -> WholeModel | None:
    """Shard a model that Trainer itself trains, and its frozen reference; return what gathers it, None where nothing is sharded.

    Both count as prepared: Trainer then wraps them in nothing else.
    """
    if parallel.sharding is None:
        return None
    _check_dtypes(model)
    whole = WholeModel(model)
    for root in (model, reference):
        if root is not None:
            parallel.shard(root)
            parallel.count_as_prepared(root)
    return whole


def _check_dtypes(root: nn.Module) -> None:
    first = next(root.parameters()).dtype
    for name, p in root.named_parameters():
        if p.dtype != first:
            raise UserError(
                f"training.fsdp gathers the weights of a layer in one dtype, got {p.dtype} in {name} beside others. Set "
                "model.dtype to that of the adapter or of the critic"
            )


@contextmanager
def model_is_whole(trainer: Any) -> Iterator[None]:
    """Let a trainer's `model` be whole, to load weights into it, which its sharded one then gets."""
    if trainer.whole is None:
        yield
        return
    own = trainer.model
    try:
        with trainer.whole.gathered(write=True) as trainer.model:
            yield
    finally:
        trainer.model = own
