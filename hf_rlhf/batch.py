"""Data that plugins receive (`Rollouts`, `Scored`) and return (`Completions`, `Credit`).

Letters: n rows of this process, N rows of the rollout over all processes, N_u rows of one optimizer step,
B rows of a micro-batch, T completion tokens (padded on the right), G rows per prompt, V vocabulary.

    Completions (from a rollout engine; rows of one prompt are adjacent)
        ids               n lists of int        completion tokens, the end-of-sequence token included
        masks             n lists of 0/1        1 on tokens the policy sampled, 0 on those of tools or an environment; None: all 1
        finish_reasons    n of "stop"/"length"  "length": truncated at max_new_tokens
        logps             n lists of float      log-probs as the sampler reports them, or None
        routed_experts    None                  reserved for the experts that the sampler's routers chose
        exact             bool                  logps equal the trainer's up to rounding: they are not computed again
        forks             n lists of forks      (start, ids): from completion token `start` on, the context is `ids` and not what
                                                stands before it; None: no row has one
        episodes, agents  n of int              episode of each row, counted over prompts x G, and its agent; from environments,
                                                where they are not one row each; None: they are
        columns           name -> n values      beside those of the dataset; an environment's are `episode/<name>`

    Rollouts (to reward sources; n rows), which return per row a number, None, or
        Spans             [(end, value), ...]   a reward for each step: `end` is the character offset after it
        TokenScores       [value, ...]          a reward for each completion token
        prompts           n of str or messages  as the dataset has them
        completions       n of str              decoded after their prompts, without special tokens
        openings          n of str              the tag that the prompt leaves open, such as "<think>\\n"
        prompt_ids        n lists of int
        completion_ids    n lists of int
        masks             n lists of 0/1
        finish_reasons    n of "stop"/"length"
        columns           name -> n values      every further column of the dataset
        forks             n lists of forks      as in Completions
        group_ids         n of int              equal for the rows of one prompt, and of one agent in an environment of several
        episode_ids       n of int              equal for the agents of one episode; else one per row
        messages          n conversations       with an environment: the prompt and all that was said after it

    ReferenceRows (to references; B rows)
        prompt_ids        B lists of int        of the prompt that the reference sees
        completion_ids    B lists of int
        mask              (B, T) float          1 on tokens the policy sampled, whose log-probs are wanted
        temperature       float                 at which log-probs are taken
        by_model          function              scores by the model that the reference built

    Scored (to advantage estimators and filters; N rows: of every process with across_groups, else of one)
        mask              (N, T) float          1 on tokens the policy sampled
        token_rewards     (N, T) float          reward at its token, after in-reward KL; 0 off the mask
        group_ids         (N,) int              equal for the rows of one prompt and agent; groups may vary in size
        episode_ids       (N,) int or None      equal for the agents of one episode, each of which has a row
        agents            (N,) int or None      number of the row's agent, 0 where there is one
        kl_penalties      (N, T) float or None  what the KL in the reward subtracted from token_rewards
        values            (N, T) float or None  the critic's value of the state in which each token was sampled
        scores            name -> (N,) float    each reward source before its weight, NaN where it does not apply
        weights           name -> float         the weight of each reward source
        old_logps         (N, T) float or None  log-probs of the sampling policy, computed by the trainer
        ref_logps         (N, T) float or None  log-probs of the reference
        sampler_logps     (N, T) float or None  log-probs as the sampler reported them
        old_entropy       (N, T) float or None  entropy of the distribution that each token was sampled from, in nats
        sum_sq_probs      (N, T) float or None  sum over V of p_v^2 where each token was sampled
        greedy            (N,) float or None    total score of the greedy completion of the row's prompt
        finished          (N,) bool or None     False where the completion was truncated
        completion_ids    (N, T) int or None    completion tokens, tool tokens included; 0 in the padding
        turns             (N, T) int or None    number of the turn that sampled each token, from 0; -1 off the mask
        states            (N, T) int or None    number of the state in which that turn began; -1 off the mask. Within a group
                                                equal for equal states
        advantages        (N, T) float or None  to filters that need them, which run after the estimator

    Credit (from advantage estimators that need values, or that log metrics of their own)
        advantages        (N, T) float          0 off the mask
        returns           (N, T) float or None  the critic's targets; None where the estimator needs no values
        value_mask        (N, T) float or None  1 on tokens at which the critic learns; None: those of the mask
        metrics           name -> float, or     logged as advantage/<name>, the mean over finite entries
                          (N,) or (N, T) tensor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Fork = tuple[int, list[int]]
"""(start, ids): from completion token `start` on, the context is `ids` and not what stands before it."""


@dataclass(kw_only=True)
class Prompt:
    """One prompt: its tokens, the dataset's text or chat messages, the tag that it leaves open, and its row's other columns."""

    ids: list[int]
    prompt: str | list[dict[str, Any]]
    columns: dict[str, Any] = field(default_factory=dict)
    opening: str = ""
    max_new_tokens: int | None = None
    """Most tokens of its completion; None: the engine's own bound."""
    stop: Sequence[str] = ()
    """Texts that end its completion and are kept. An engine need not know of them: the core cuts what it writes after one."""
    seed: int | None = None
    """Seed of its completion, for `RolloutEngine.sample`."""


@dataclass(kw_only=True)
class Completions:
    """The result of a rollout engine: `num_generations` adjacent rows per prompt."""

    ids: list[list[int]]
    masks: list[list[int]] | None = None
    finish_reasons: list[str]
    logps: list[list[float]] | None = None
    routed_experts: None = None
    """Reserved: the experts that the sampler's routers chose. Must be None."""
    exact: bool = False
    forks: list[list[Fork]] | None = None
    episodes: list[int] | None = None
    agents: list[int] | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    versions: list[str] | None = None
    """`Policy.version` of the weights that sampled each row; None stands for the policy's in all rows."""

    def select(self, rows: slice) -> Completions:
        """Return some adjacent rows."""
        known = {part.name: getattr(self, part.name) for part in fields(self)}
        parts: dict[str, Any] = {name: x[rows] for name, x in known.items() if isinstance(x, list)}
        return replace(self, columns={name: x[rows] for name, x in self.columns.items()}, **parts)


@dataclass
class Spans:
    """A reward for each step of a completion: (end, value), where `end` is the character offset after the step."""

    values: list[tuple[int, float]]


@dataclass
class TokenScores:
    """A reward for each token of a completion, tool tokens included, whose rewards are ignored."""

    values: list[float]


@dataclass(kw_only=True)
class Rollouts:
    """Prompts with their completions, as reward sources see them."""

    prompts: list[Any]
    completions: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    masks: list[list[int]]
    finish_reasons: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    group_ids: list[int] = field(default_factory=list)
    openings: list[str] = field(default_factory=list)
    messages: list[list[dict[str, Any]]] = field(default_factory=list)
    forks: list[list[Fork]] = field(default_factory=list)
    episode_ids: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.completions)

    def select(self, rows: Sequence[int]) -> Rollouts:
        """Return some rows, in this order."""
        return Rollouts(
            prompts=[self.prompts[i] for i in rows],
            completions=[self.completions[i] for i in rows],
            prompt_ids=[self.prompt_ids[i] for i in rows],
            completion_ids=[self.completion_ids[i] for i in rows],
            masks=[self.masks[i] for i in rows],
            finish_reasons=[self.finish_reasons[i] for i in rows],
            columns={name: [values[i] for i in rows] for name, values in self.columns.items()},
            group_ids=[self.group_ids[i] for i in rows] if self.group_ids else [],
            openings=[self.openings[i] for i in rows] if self.openings else [],
            messages=[self.messages[i] for i in rows] if self.messages else [],
            forks=[self.forks[i] for i in rows] if self.forks else [],
            episode_ids=[self.episode_ids[i] for i in rows] if self.episode_ids else [],
        )

    def turns(self) -> list[str]:
        """Return each completion after the tag that its prompt left open: what the assistant said, thoughts delimited."""
        return [a + b for a, b in zip(self.openings or [""] * len(self), self.completions, strict=True)]

    def column(self, name: str) -> list[Any]:
        """Return the values of a dataset column, one per row. Raises `KeyError` naming the columns that exist.

        A dotted name such as `reward_model.ground_truth` or `answers.0` reads inside mappings and lists: None where a row
        lacks the value.
        """
        column, *keys = name.split(".")
        if name not in self.columns and keys and column in self.columns:
            return [_nested(value, keys) for value in self.columns[column]]
        if name not in self.columns:
            raise KeyError(f"the dataset has no column {name!r}; it has: {', '.join(sorted(self.columns)) or 'none'}")
        return self.columns[name]


def _nested(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list | tuple) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


@dataclass(kw_only=True)
class Scored:
    """A whole rollout with its rewards, or with whole groups of it those of one process, as estimators and filters see it."""

    mask: Tensor
    token_rewards: Tensor
    group_ids: Tensor
    episode_ids: Tensor | None = None
    agents: Tensor | None = None
    kl_penalties: Tensor | None = None
    values: Tensor | None = None
    scores: dict[str, Tensor] | None = None
    weights: dict[str, float] | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    sampler_logps: Tensor | None = None
    old_entropy: Tensor | None = None
    sum_sq_probs: Tensor | None = None
    greedy: Tensor | None = None
    finished: Tensor | None = None
    completion_ids: Tensor | None = None
    turns: Tensor | None = None
    states: Tensor | None = None
    advantages: Tensor | None = None

    def returns(self) -> Tensor:
        """Return each row's undiscounted return (N,): the sum of its token rewards over the mask."""
        return self._over_mask(self.token_rewards)

    def totals(self) -> Tensor:
        """Return each row's weighted total score (N,) before any KL; a source that does not apply adds nothing.

        Without `scores`: the returns, with the KL penalties added back.
        """
        if not self.scores:
            given = self.token_rewards if self.kl_penalties is None else self.token_rewards + self.kl_penalties
            return self._over_mask(given)
        weights = self.weights or {}
        return sum(
            (weights.get(source, 1.0) * score.nan_to_num() for source, score in self.scores.items()),
            start=self.mask.new_zeros(len(self.mask)),
        )

    def _over_mask(self, x: Tensor) -> Tensor:
        """Sum each row of (N, T) over the mask, some rows at a time: the products stay in a processor's cache."""
        import torch

        rows = max(1, 2**18 // max(1, x.size(1))) if x.device.type == "cpu" else max(1, len(x))
        return torch.cat([(part * m).sum(1) for part, m in zip(x.split(rows), self.mask.split(rows), strict=True)])

    def groups(self) -> tuple[Tensor, Tensor]:
        """Return the group of each row (N,), numbered from 0, and the number of rows in each group (groups,).

        Computed once per `group_ids` tensor, which must not be changed in place; `dataclasses.replace` computes it again.
        """
        known = self.__dict__.get("_groups")
        if known is None or known[0] is not self.group_ids:
            _, index, counts = self.group_ids.unique(return_inverse=True, return_counts=True)
            known = self.__dict__["_groups"] = (self.group_ids, index, counts)
        return known[1], known[2]

    def group_sum(self, x: Tensor) -> Tensor:
        """Sum `x` (N,) over each row's group; returns (N,)."""
        index, counts = self.groups()
        return x.new_zeros(len(counts)).index_add(0, index, x)[index]

    def group_size(self) -> Tensor:
        """Return the number of rows in each row's group, (N,) int."""
        index, counts = self.groups()
        return counts[index]

    def group_mean(self, x: Tensor) -> Tensor:
        """Average `x` (N,) over each row's group; returns (N,)."""
        return self.group_sum(x) / self.group_size()

    def group_std(self, x: Tensor, ddof: int = 1) -> Tensor:
        """Return the standard deviation of `x` (N,) over each row's group; 0 where all values are equal or the group has one row.

        Equality is tested by max == min: rounding gives eight values of 0.2 a deviation of 1.5e-8.
        """
        deviation = x - self.group_mean(x)
        variance = self.group_sum(deviation**2) / (self.group_size() - ddof).clamp(min=1)
        return variance.sqrt().masked_fill(self.group_is_flat(x), 0.0)

    def group_is_flat(self, x: Tensor) -> Tensor:
        """Return (N,) bool, True where every row of the group has exactly the same `x`: no signal between them."""
        index, counts = self.groups()
        top = x.new_full((len(counts),), float("-inf")).scatter_reduce(0, index, x, "amax")
        bottom = x.new_full((len(counts),), float("inf")).scatter_reduce(0, index, x, "amin")
        return (top == bottom)[index]


@dataclass(kw_only=True)
class Credit:
    """Advantages with the critic's targets, for estimators that need values, and an estimator's own metrics.

    A metric is a number, or a tensor (N,) or (N, T) whose mean over finite entries (and the mask) is logged.
    """

    advantages: Tensor
    returns: Tensor | None = None
    value_mask: Tensor | None = None
    metrics: dict[str, Tensor | float] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: Tensor | Credit) -> Credit:
        """Return a `Credit` from what an estimator returned: advantages alone, or a `Credit`."""
        return answer if isinstance(answer, Credit) else cls(advantages=answer)


@dataclass(kw_only=True)
class ReferenceRows:
    """B rows that a reference scores."""

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    mask: Tensor
    temperature: float
    by_model: Callable[[frozenset[str], int | None], dict[str, Any]]
    """(needs, top_k) -> scores by the model that the reference built, as `Reference.score` returns them."""


@dataclass(kw_only=True)
class Context:
    """The process in which a plugin is set up, before the first rollout."""

    device: torch.device
    tokenizer: PreTrainedTokenizerBase | None
    """None where rewards are scored without a policy."""
    policy: PreTrainedModel | None
    """None in worker processes, and where rewards are scored without a policy."""
    seed: int = 0
    process_index: int = 0
    num_processes: int = 1
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """The recipe's `model.chat_template_kwargs`."""
    prompt_tokens: int | None = None
    """Tokens of the longest training prompt, or before the longest turn of an episode; None where it is not known."""
