"""Completions of the policy for a share of the prompts, and the dataset's for the others (GKD, arXiv:2306.13649, algorithm 1).

It is for distillation: a divergence of whole distributions is measured in every state of a completion, whoever wrote it. What
takes a completion's tokens for samples of the policy (rewards, sampled KLs, a critic) is refused. The paper draws once per
batch which of the two it gets; here each rollout has its share of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Fraction, Plugin, RolloutEngine, TrainedCritic
from hf_rlhf.batch import Completions

from ._settings import end_tokens
from .generate import Generate

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm, Policy
    from hf_rlhf.batch import Prompt


@dataclass(kw_only=True)
class Mixed(Generate):
    """Samples completions for a share of the prompts and takes those of the others from the dataset."""

    name = "mixed"
    needs = frozenset({"entropy"})  # of the distributions: the dataset's tokens are no sample of it
    provides = frozenset()

    share: Fraction = 0.5
    """Share of a rollout's prompts whose completion is sampled (lambda in the paper); 1: all, 0: none."""
    column: str = "completion"
    """Column with a completion of each prompt: a text (the end-of-sequence token is added) or a list of token ids, of which the
    first `max_new_tokens` are used."""

    @property
    def exact_logps(self) -> bool:
        """False: the dataset has no log-probs."""
        return False

    def columns(self) -> set[str]:
        """Return the required dataset columns."""
        return {self.column}

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield what takes the dataset's tokens for samples of the policy."""
        yield from super().check(algorithm)
        yield from (f"rollout=mixed: {problem}, or set rollout.use=generate" for problem in _misled(algorithm))

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from super().remarks(algorithm)
        if self.share < 1 and self.num_generations > 1:
            yield f"the dataset has one completion per prompt, which num_generations={self.num_generations} repeats"
        if self.share < 1:
            yield (
                "the dataset's completions count in the statistics of a rollout's rows; kl/ref takes their tokens for samples "
                "and is no KL, while the divergence of the estimator is exact"
            )

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        """Return completions (see `RolloutEngine`); a call with a `temperature`, as evaluations have, samples them all."""
        import torch

        if temperature is not None:
            return super().__call__(policy, prompts, num_generations, temperature=temperature)
        count = int(self.share * len(prompts) + torch.rand(()).item())  # the share in expectation, whatever the number
        chosen = torch.randperm(len(prompts))[:count].sort().values.tolist()
        found = super().__call__(policy, [prompts[i] for i in chosen], num_generations) if chosen else None
        sampled = iter(zip(found.ids, found.finish_reasons, strict=True) if found else ())
        rows: list[tuple[list[int], str]] = []
        for i, prompt in enumerate(prompts):
            of_prompt = (
                islice(sampled, num_generations) if i in chosen else [self._given(policy, prompt)] * num_generations
            )
            rows += of_prompt
        return Completions(ids=[ids for ids, _ in rows], finish_reasons=[reason for _, reason in rows])

    def _given(self, policy: Policy, prompt: Prompt) -> tuple[list[int], str]:
        """Return the dataset's completion of a prompt, and how it ends."""
        given: Any = prompt.columns.get(self.column)
        if isinstance(given, str):
            eos = policy.tokenizer.eos_token_id
            given = [*policy.tokenizer(given, add_special_tokens=False)["input_ids"], *([] if eos is None else [eos])]
        if not (isinstance(given, list) and given and all(isinstance(x, int) for x in given)):
            raise ValueError(
                f"rollout.column={self.column!r} must hold a text or a list of token ids, got {str(given)[:80]!r}. Name the "
                "column with the completions"
            )
        ids = given[: self.max_new_tokens]
        return ids, "stop" if ids[-1] in end_tokens(policy) else "length"


def _misled(algorithm: Algorithm) -> Iterator[str]:
    """Yield what would take a token of the dataset for one that the policy sampled."""
    for i, source in enumerate(algorithm.rewards):
        if source.weight:
            yield (
                f"rewards.{i}={source.name} would reward the policy for completions that it did not sample. Set "
                f"rewards.{i}.weight=0"
            )
    for i, environment in enumerate(algorithm.environment):
        yield f"environment.{i}={environment.name} plays its episodes with the policy alone. Set environment=[]"
    if not algorithm.kl_in("loss"):
        yield "no KL in the loss learns from the dataset's completions. Set kl=[{use: in_loss, estimator: {use: jsd}}]"
    for i, kl in enumerate(algorithm.kl):
        if kl.places != {"loss"} and kl.places:
            yield f"kl.{i}={kl.name} credits sampled tokens. Set kl.{i}.use=in_loss"
        elif "full_distribution" not in kl.estimator.needs:
            yield (
                f"kl.{i}.estimator={kl.estimator.name} takes tokens for samples of the policy. Set kl.{i}.estimator.use=jsd, "
                "forward or exact"
            )
        controller = getattr(kl, "controller", None)
        if controller is not None and type(controller).observe is not Plugin.observe:
            yield f"kl.{i}.controller={controller.name} reads the KL of sampled tokens. Set kl.{i}.controller.use=fixed"
    if isinstance(algorithm.critic, TrainedCritic):
        yield f"critic={algorithm.critic.name} would learn the returns of completions of the dataset. Set critic.use=none"
    if not _is_zero_without_rewards(algorithm):
        yield f"advantages={algorithm.advantages.name} may credit tokens without a reward. Set advantages.use=reinforce"
    if not algorithm.policy_loss.zero_without_advantage:
        yield f"policy_loss={algorithm.policy_loss.name} has a gradient without an advantage. Set policy_loss.use=reinforce"


def _is_zero_without_rewards(algorithm: Algorithm) -> bool:
    """Return True if the estimator needs nothing but rewards and gives 0 where they are 0, as tried."""
    import torch

    from hf_rlhf.batch import Credit, Scored

    if any(plugin.needs for path, plugin in algorithm.plugins() if path.split(".")[0] == "advantages"):
        return False
    mask = torch.ones(2, 2)
    scored = Scored(mask=mask, token_rewards=0 * mask, group_ids=torch.arange(2))
    return not bool(Credit.of(algorithm.advantages(scored)).advantages.any())


@hookimpl
def rollout() -> list[type[RolloutEngine]]:
    return [Mixed]
