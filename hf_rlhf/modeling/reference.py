"""Log-probs of the reference: a model of its own, or the policy with its adapter off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_rlhf.modeling.lm_head import Measure, at_least_float32
from hf_rlhf.modeling.policy import ActorCritic, sampled_states
from hf_rlhf.modeling.token_batch import TokenBatch


class ReferencePolicy:
    """Compute the reference's log-probs: of its own model, or of the policy inside `active` (with its adapter off)."""

    def __init__(self, model: nn.Module | None, policy: Any, active: Any, temperature: float):
        self._active = active
        self._policy = policy
        self._own = model
        self.module = ActorCritic(model if model is not None else policy, None, temperature)

    @property
    def own(self) -> nn.Module | None:
        """The reference's own model, or None if the policy serves."""
        return self._own

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return log-probs (B, T), 0 off the mask."""
        with self._as_reference():
            found: Tensor = self.module(batch)["logps"]
            return found

    @torch.no_grad()
    def measures(
        self, batch: TokenBatch, named: Mapping[str, tuple[Callable[..., Tensor], bool]]
    ) -> dict[str, Measure]:
        """Return the `measures` that `ActorCritic.forward` takes, from name -> (estimator, whether it carries a gradient).

        The reference's hidden states are computed here, its distributions chunk by chunk when they are read.
        """
        with self._as_reference():
            states, head = sampled_states(self.module.policy, batch)
        adapted = self._own is None  # an adapter or a trained copy of the head has to be off as well

        def log_probs(part: slice) -> Tensor:
            with torch.no_grad(), self._as_reference() if adapted else nullcontext():
                return (at_least_float32(head(states[part])) / self.module.temperature).log_softmax(-1)

        def make(estimator: Callable[..., Tensor], gradient: bool) -> Measure:
            def measure(own: Tensor, part: slice) -> Tensor:
                return estimator(own if gradient else own.detach(), log_probs(part))

            return measure

        return {name: make(estimator, gradient) for name, (estimator, gradient) in named.items()}

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        context: AbstractContextManager[Any] = nullcontext() if self._own is not None else self._active(self._policy)
        training = self.module.policy.training
        self.module.policy.eval()
        try:
            with context:
                yield
        finally:
            self.module.policy.train(training)
