"""The references of a run: each distinct model loaded once, each distinct reference run once per rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_rlhf.axes import Reference, check_output
from hf_rlhf.batch import ReferenceRows, Rollouts
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.references import BEHIND, ROWS, base_label, bases_of, keyed, top_k_of
from hf_rlhf.config.schedule import device_of
from hf_rlhf.modeling.lm_head import Measure
from hf_rlhf.modeling.reference import DISTRIBUTIONS, ReferencePolicy, Scorer, measures_of, measures_of_top
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.scoring.answers import Answer
from hf_rlhf.scoring.scorer import applies, total, totals
from hf_rlhf.training.losses import over_distributions

Models = dict[str, tuple[Reference, nn.Module | None]]
"""Label -> a reference and its own model, if it has one."""


@dataclass(kw_only=True)
class References:
    """Score rows by every reference of an algorithm, and move those that move."""

    algorithm: Algorithm
    scorers: dict[str, ReferencePolicy]
    """By the keys of `Algorithm.references`."""
    models: Models

    @classmethod
    def build(cls, a: Algorithm, policy: Any, device: torch.device) -> References:
        """Build each distinct model once."""
        models: Models = {}
        for label, base in bases_of(a).items():
            own = check_output("reference", base, base.build(policy), None, method="build")
            models[label] = base, None if own is None else own.to(device_of(base, device))
        scorers = {}
        for key, use in a.references.items():
            base, own = models[base_label(a, use.reference)]
            heat = a.rollout.temperature
            asked = _asking(use.reference, heat)
            scorers[key] = ReferencePolicy(own, policy, base.active, heat, asked, use.reference.known_tokens)
        return cls(algorithm=a, scorers=scorers, models=models)

    @property
    def await_rewards(self) -> bool:
        """True if the prompts of a reference depend on the rewards' scores."""
        return any("scores" in use.reference.needs for use in self.algorithm.references.values())

    def prompts(
        self, rollouts: Rollouts, scores: dict[str, list[float | None]] | None = None
    ) -> dict[str, list[list[int]]]:
        """Return the prompts that references read in place of the rows' own, by key: of those that need the rewards' `scores` if
        these are given, else of the others."""
        found = {}
        for key, use in self.algorithm.references.items():
            if ("scores" in use.reference.needs) == (scores is not None):
                made = use.reference.prompts(rollouts, scores)
                if made is not None:
                    self._check_room(key, made, rollouts)
                    found[key] = made
        return found

    def _check_room(self, key: str, prompts: list[list[int]], rollouts: Rollouts) -> None:
        name = self.algorithm.references[key].reference.name
        for own, new, forks in zip(rollouts.prompt_ids, prompts, rollouts.forks, strict=False):
            if new != own and any(ids[: len(own)] != own for _, ids in forks):
                raise UserError(
                    f"reference={name} puts a context into the prompt of a row, and this one has a turn (a fork) whose "
                    "conversation does not begin with that prompt. Choose another reference, or an environment that only adds "
                    "messages, with a chat template that keeps earlier turns (environment.0.history=extend)"
                )
        config = getattr(self.scorers[key].module.policy, "config", None)
        room = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = max((len(p) + len(c) for p, c in zip(prompts, rollouts.completion_ids, strict=True)), default=0)
        if room is not None and longest > room:
            raise UserError(
                f"reference={name}: a prompt and its completion must fit into the model's context of {room} tokens, got "
                f"{longest}. Shorten the contexts, or lower dataset.max_prompt_tokens"
            )

    def labels(self, keys: Any) -> list[str]:
        """Return the labels of the models that the references with these keys run."""
        return sorted({base_label(self.algorithm, self.algorithm.references[key].reference) for key in keys})

    def moving(self) -> Models:
        """Return the models that move, by label."""
        return {label: (base, own) for label, (base, own) in self.models.items() if base.moves and own is not None}

    def move(self, policy: Any, step: int) -> bool:
        """Move what moves after an optimizer step; returns whether anything does."""
        for base, own in self.moving().values():
            assert own is not None
            base.move(own, policy, step)
        return bool(self.moving())

    def score(self, key: str, batch: TokenBatch, compared: bool) -> tuple[dict[str, Tensor], dict[str, Measure]]:
        """Return what is kept of a micro-batch of a rollout, under its names in tables, and with `compared` the measures of KLs
        over distributions there. One forward."""
        use, scorer = self.algorithm.references[key], self.scorers[key]
        whole = [(title, kl) for title, kl in use.rollout if top_k_of(kl) is None] if compared else []
        found = scorer.score(batch, use.needs | ({DISTRIBUTIONS} if whole else set()), use.top_k)
        kept = {
            keyed(f"ref_{name}" if name == "logps" else name, key): x
            for name, x in found.items()
            if name != DISTRIBUTIONS
        }
        measures: dict[str, Measure] = {}
        if whole:
            measures |= measures_of(found[DISTRIBUTIONS], over_distributions(whole, update=False))
        if compared:
            measures |= self._over_top(key, batch, kept, use.rollout, update=False)
        return kept, measures

    def in_update(self, inputs: dict[str, Any]) -> dict[str, Measure]:
        """Return the measures of KLs over distributions for a micro-batch of the update: one forward of each reference that
        they need whole."""
        measures: dict[str, Measure] = {}
        for key, use in self.algorithm.references.items():
            batch = inputs.get(f"{BEHIND}{key}", inputs["batch"])
            if whole := [(title, kl) for title, kl in use.update if top_k_of(kl) is None]:
                measures |= self.scorers[key].measures(batch, over_distributions(whole, update=True))
            measures |= self._over_top(key, batch, inputs, use.update, update=True)
        return measures

    @staticmethod
    def _over_top(key: str, batch: TokenBatch, known: Any, compared: Any, update: bool) -> dict[str, Measure]:
        """Return the measures of those of `compared` that read the reference's likeliest tokens, which `known` holds."""
        over = [(title, kl) for title, kl in compared if top_k_of(kl) is not None]
        if not over:
            return {}
        sizes = [top_k_of(kl) or 0 for _, kl in over]
        estimators = over_distributions(over, update=update)
        named = {name: (*made, size) for (name, made), size in zip(estimators.items(), sizes, strict=True)}
        logps, ids = (known[keyed(name, key)][batch.rows, batch.columns] for name in ("top_logps", "top_ids"))
        return measures_of_top(logps, ids, named)


def _asking(reference: Reference, temperature: float) -> Scorer:
    """Return the call of `score` of a reference for rows of a batch."""

    def score(batch: TokenBatch, by_model: Any, needs: frozenset[str], top_k: int | None) -> dict[str, Any]:
        rows = ReferenceRows(
            prompt_ids=batch.prompt_ids,
            completion_ids=batch.completion_ids,
            mask=batch.mask,
            temperature=temperature,
            by_model=by_model,
        )
        return reference.score(rows, needs, top_k)

    return score


def scores_of(
    answers: dict[str, list[Answer]], rollouts: Rollouts, weights: dict[str, float]
) -> dict[str, list[float | None]]:
    """Return the score of each source and the `total` of each row, None where none applies, as `Reference.prompts` gets them."""
    found = totals(answers, rollouts)
    sums, valid = total(found, weights, len(rollouts))
    found["total"] = sums.masked_fill(~valid, torch.nan)
    return {label: [None if x != x else x for x in scores.tolist()] for label, scores in found.items()}


def rows_of_kls(a: Algorithm, rollouts: Rollouts, mask: Tensor) -> dict[str, Tensor]:
    """Return the masks (n, T) of KLs that are taken on the rows of their `when` only."""
    found = {}
    for title, kl in a.titled("kl"):
        if kl.when is not None:
            on = [applies(f"kl {title!r}", kl.when, rollouts, i) for i in range(len(rollouts))]
            found[f"{ROWS}{title}"] = mask * torch.tensor(on, device=mask.device).unsqueeze(1)
    return found
