"""Log-probs of a reference: a model of its own, or the policy with its adapter off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_rlhf.modeling.lm_head import TOKENS, Measure, TokenStatistics, at_least_float32, with_rest
from hf_rlhf.modeling.lm_head import score as score_tokens
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.token_batch import TokenBatch

LOGPS, DISTRIBUTIONS, TOP = "logps", "distributions", "top_logps"
"""Scores of a reference; TOP gives `top_ids` as well."""
Needs = frozenset[str]
Scores = dict[str, Any]
Scorer = Callable[[TokenBatch, Callable[[Needs, int | None], Scores], Needs, int | None], Scores]
"""(rows, their scores by the model, needs, top_k) -> scores, as `Reference.score` returns them."""
Estimators = Mapping[str, tuple[Callable[..., Tensor], bool]]
"""Name -> (estimator of a KL over whole distributions, whether it carries a gradient)."""


class ReferencePolicy:
    """Score rows by a reference: its own model, the policy inside `active` (with its adapter off), or `score` of the plugin.

    `known`: number of token ids, from 0, that mean the same to both; None: all that both models have.
    """

    def __init__(
        self,
        model: nn.Module | None,
        policy: Any,
        active: Any,
        temperature: float,
        score: Scorer | None = None,
        known: int | None = None,
    ):
        self._active = active
        self._policy = policy
        self._own = model
        self._score = score
        self._known = known
        self.module = ActorCritic(model if model is not None else policy, None, temperature)

    @property
    def own(self) -> nn.Module | None:
        """The reference's own model, or None if the policy serves."""
        return self._own

    @property
    def tokens(self) -> int:
        """Number of token ids, from 0, that mean the same to the reference as to the policy."""
        rows = [_embedded(x) for x in (self.module.policy, self._policy)]
        return min(rows if self._known is None else [*rows, self._known])

    @property
    def partial(self) -> bool:
        """True if the policy has token ids that the reference does not know."""
        return self._own is not None and self.tokens < _embedded(self._policy)

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return log-probs (B, T), 0 off the mask; NaN for a token that the reference does not know."""
        found: Tensor = self.score(batch, frozenset({LOGPS}))[LOGPS]
        return found

    @torch.no_grad()
    def score(self, batch: TokenBatch, needs: Needs, top_k: int | None = None) -> dict[str, Any]:
        """Return what `Reference.score` does for the rows of `batch`."""
        if self._score is None:
            return self._by_model(batch, needs, top_k)
        pieces = batch.pieces  # plugins see rows without forks
        found = self._score(pieces, partial(self._by_model, pieces), needs, top_k)
        if pieces is batch:
            return found
        return {name: x if callable(x) else batch.place(x[pieces.rows, pieces.columns]) for name, x in found.items()}

    def measures(self, batch: TokenBatch, named: Estimators) -> dict[str, Measure]:
        """Return the `measures` that `ActorCritic.forward` takes.

        The reference's hidden states are computed here, its distributions chunk by chunk when they are read.
        """
        return measures_of(self.score(batch, frozenset({DISTRIBUTIONS}))[DISTRIBUTIONS], named)

    @torch.no_grad()
    def _by_model(self, batch: TokenBatch, needs: Needs, top_k: int | None = None) -> dict[str, Any]:
        """Run the model once, on its own device, for all that is wanted."""
        device, own = batch.device, self._own
        there = device if own is None else next(own.parameters()).device
        batch = batch if there == device else batch.to(there)
        with self._as_reference():
            states, head = self.module.states(batch)
            distributions = self._distributions(states, head, device)
            found: dict[str, Any] = {}
            if LOGPS in needs and not self._cut():
                heat = self.module.temperature
                found[LOGPS] = batch.place(
                    score_tokens(head, states, batch.targets, heat, TokenStatistics())["logps"]
                ).to(device)
            if TOP in needs or (LOGPS in needs and self._cut()):
                named = self._by_chunks(batch, distributions, top_k if TOP in needs else None)
                found |= {
                    name: batch.place(x.to(there)).to(device)
                    for name, x in named.items()
                    if name != LOGPS or LOGPS not in found
                }
        if DISTRIBUTIONS in needs:
            found[DISTRIBUTIONS] = distributions
        return {name: x for name, x in found.items() if name in needs or name == "top_ids"}

    def _cut(self) -> bool:
        """Return True if the reference has token ids that mean something else, or nothing, to the policy."""
        return self._own is not None and self.tokens < _embedded(self.module.policy)

    def _distributions(
        self, states: Tensor, head: Callable[[Tensor], Tensor], device: torch.device
    ) -> Callable[[slice], Tensor]:
        """Return the function from a slice of the sampled tokens to log-probs (c, V) of the tokens that both know."""
        adapted = self._own is None  # an adapter or a trained copy of the head has to be off as well
        tokens = self.tokens if self._cut() else None

        def log_probs(part: slice) -> Tensor:
            with torch.no_grad(), self._as_reference() if adapted else nullcontext():
                logits = at_least_float32(head(states[part]))[:, :tokens]
                return (logits / self.module.temperature).log_softmax(-1).to(device)

        return log_probs

    def _by_chunks(
        self, batch: TokenBatch, log_probs: Callable[[slice], Tensor], top_k: int | None
    ) -> dict[str, Tensor]:
        """Return logps (n,), NaN for a token that the reference does not know, and with `top_k` top_logps and top_ids (n, k)."""
        n, size = batch.tokens, TOKENS
        pieces: dict[str, list[Tensor]] = {}
        for start in range(0, max(1, n), size):
            part = slice(start, min(start + size, n))
            there = log_probs(part)
            targets = batch.targets[part].to(there.device)
            known = targets < there.size(1)
            chosen = there.gather(1, targets.where(known, 0).unsqueeze(1)).squeeze(1)
            pieces.setdefault(LOGPS, []).append(chosen.where(known, torch.nan))
            if top_k is not None:
                top = there.topk(min(top_k, there.size(1)), dim=-1)
                pieces.setdefault(TOP, []).append(top.values)
                pieces.setdefault("top_ids", []).append(top.indices)
        return {name: torch.cat(columns) for name, columns in pieces.items()}

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


def _embedded(model: Any) -> int:
    return len(model.get_input_embeddings().weight)


def measures_of(log_probs: Callable[[slice], Tensor], named: Estimators) -> dict[str, Measure]:
    """Return measures that compare whole distributions with those that `log_probs` gives, over the tokens that both know."""

    def make(estimator: Callable[..., Tensor], gradient: bool) -> Measure:
        def measure(own: Tensor, part: slice) -> Tensor:
            there = log_probs(part).to(own.dtype)
            if there.size(1) < own.size(1):
                own = own[:, : there.size(1)].log_softmax(-1)
            return estimator(own if gradient else own.detach(), there)

        return measure

    return {name: make(estimator, gradient) for name, (estimator, gradient) in named.items()}


def measures_of_top(
    top_logps: Tensor, top_ids: Tensor, named: Mapping[str, tuple[Callable[..., Tensor], bool, int]]
) -> dict[str, Measure]:
    """Return measures over the reference's likeliest tokens, (n, K) each, and one bucket for all others.

    `named` adds to each estimator its number of tokens, at most K. Both distributions are coarsened alike, so that a divergence
    is a lower bound of that of the whole ones; inside the bucket there is no gradient.
    """

    def make(estimator: Callable[..., Tensor], gradient: bool, k: int) -> Measure:
        def measure(own: Tensor, part: slice) -> Tensor:
            ids, there = top_ids[part, :k].long(), top_logps[part, :k].to(own.dtype)
            own = own if gradient else own.detach()
            return estimator(with_rest(own.gather(1, ids)), with_rest(there))

        return measure

    return {name: make(*chosen) for name, chosen in named.items()}
