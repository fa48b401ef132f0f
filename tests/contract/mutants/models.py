"""Wrong rewards, rollout engines, critics, references and update rules; see `base`."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_rlhf.axes import Critic, Pending, Reference, RewardSource, RolloutEngine, TrainedCritic, UpdateRule
from hf_rlhf.batch import Completions, Rollouts, Spans, TokenScores
from hf_rlhf.modeling.token_batch import TokenBatch
from tests.contract.mutants.base import Mutant


class Reward(RewardSource):
    """A right reward, to be made wrong."""

    name = "wrong"

    def __call__(self, rollouts: Rollouts) -> Any:
        return [float(len(text)) for text in rollouts.completions]


class Counted(Reward):
    """Remembers its last scores in a window, which is in its state once it has scored."""

    _seen = None

    def __call__(self, rollouts: Rollouts) -> Any:
        scores: list[float] = super().__call__(rollouts)
        vars(self)["_seen"] = deque(scores, maxlen=4)
        return scores

    def state_dict(self) -> dict[str, Any]:
        return {} if self._seen is None else {"seen": self._seen}


class Short(Reward):
    """Forgets a row."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return [1.0] * (len(rollouts) - 1)


class Texts(Reward):
    """Gives texts."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return rollouts.completions


class Alone(Reward):
    """Gives one number for all."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return 0.5


class Infinite(Reward):
    """Gives an infinity."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return [float("inf")] * len(rollouts)


class FewTokens(Reward):
    """Scores the tokens without the end of sequence."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return [TokenScores([1.0] * (len(ids) - 1)) for ids in rollouts.completion_ids]


class Beyond(Reward):
    """Ends a step after the completion's last character: counted in the prompt's characters."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return [Spans([(len(p) + len(c), 1.0)]) for p, c in zip(rollouts.prompts, rollouts.completions, strict=True)]


class OtherColumn(Reward):
    """Reads a column that is not there."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return rollouts.column("solution")


class Clearing(Reward):
    """Writes into the completions."""

    def __call__(self, rollouts: Rollouts) -> Any:
        scores = [float(len(text)) for text in rollouts.completions]
        rollouts.completions[0] = "seen"
        return scores


class Ranked(Reward):
    """Scores a row by its place."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return list(range(len(rollouts)))


class Compared(Reward):
    """Says that rows stand alone, and scores a row by the longest of all."""

    rowwise = True

    def __call__(self, rollouts: Rollouts) -> Any:
        return [float(len(text)) - max(map(len, rollouts.completions)) for text in rollouts.completions]


@dataclass(kw_only=True)
class Remembering(Reward):
    """Was told something that is no setting, so that a copy made of its settings does not know it."""

    def __post_init__(self) -> None:
        self.bonus = 0.0

    def __call__(self, rollouts: Rollouts) -> Any:
        return [len(text) + self.bonus for text in rollouts.completions]


def remembering() -> Remembering:
    made = Remembering(workers="processes")
    made.bonus = 1.0
    return made


class FirstProcess(Reward):
    """Scores on the first process only."""

    def __call__(self, rollouts: Rollouts) -> Any:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            return [0.0] * len(rollouts)
        return super().__call__(rollouts)


class Logging(Reward):
    """Logs one value for the whole batch as a column."""

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        return {"judge": ["good"]}, {}


class Verifier(Reward):
    """1 where completion and answer are one, to be made wrong."""

    verifier = True

    def columns(self) -> set[str]:
        return {"answer"}

    def __call__(self, rollouts: Rollouts) -> Any:
        pairs = zip(rollouts.completions, rollouts.column("answer"), strict=True)
        return [None if answer is None else float(text == answer) for text, answer in pairs]

    def answer(self, completion: str) -> str | None:
        return completion or None


class NoneIsZero(Verifier):
    """Gives 0 where there is no reference, as if the completion were wrong (huggingface/trl#5773)."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return [x or 0.0 for x in super().__call__(rollouts)]


class NumberAnswer(Verifier):
    """Gives its final answer as a number, which majority votes cannot compare with others' text."""

    def answer(self, completion: str) -> Any:
        return len(completion)


class Noise(RolloutEngine):
    """Random tokens for each prompt, to be made wrong."""

    name = "wrong"

    def tokens(self, policy: Any, prompt: Any) -> list[int]:
        return torch.randint(3, 90, (4,)).tolist()

    def __call__(
        self, policy: Any, prompts: Sequence[Any], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        greedy = [[3 + i % 90 for i in prompt.ids] for prompt in prompts]
        rows = [
            ids if temperature == 0 else self.tokens(policy, prompt)
            for prompt, ids in zip(prompts, greedy, strict=True)
            for _ in range(num_generations)
        ]
        return Completions(ids=rows, finish_reasons=["length"] * len(rows))


class Vouching(Noise):
    """Calls log-probs exact that are not the policy's."""

    provides = frozenset({"sampler_logps"})

    def __call__(self, *args: Any, **kwargs: Any) -> Completions:
        found = super().__call__(*args, **kwargs)
        return Completions(
            ids=found.ids,
            finish_reasons=found.finish_reasons,
            logps=[[-9.0] * len(ids) for ids in found.ids],
            exact=True,
        )


class OwnCount(Noise):
    """Gives as many completions as its setting says, not as it is asked for."""

    def __call__(
        self, policy: Any, prompts: Sequence[Any], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        return super().__call__(policy, prompts, self.num_generations, temperature=temperature)


class EmptyRow(Noise):
    """Gives an empty completion where the first token ends the sequence."""

    def tokens(self, policy: Any, prompt: Any) -> list[int]:
        return []


class OutOfOrder(Noise):
    """Hands out the completions of one prompt as another's."""

    def start(self, policy: Any, prompts: Sequence[Any], num_generations: int, **kwargs: Any) -> Pending:
        class Mixed(Pending):
            def __iter__(self) -> Any:
                return ((len(prompts) - 1 - i, part) for i, part in super().__iter__())

        return Mixed(partial(self, policy, prompts, num_generations, **kwargs), len(prompts))


class WithoutEos(Noise):
    """Reports a log-prob less than it has tokens: masks and log-probs fall out of step (huggingface/trl#5144)."""

    provides = frozenset({"sampler_logps"})

    def __call__(
        self, policy: Any, prompts: Sequence[Any], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        out = super().__call__(policy, prompts, num_generations, temperature=temperature)
        out.logps = [[-1.0] * (len(ids) - 1) for ids in out.ids]
        return out


class Training(Noise):
    """Leaves the model in training mode: dropout in all log-probs after it."""

    def tokens(self, policy: Any, prompt: Any) -> list[int]:
        policy.model.train()
        return super().tokens(policy, prompt)


class OwnGenerator(Noise):
    """Seeds by itself with what it was made with, so that no two calls agree."""

    def tokens(self, policy: Any, prompt: Any) -> list[int]:
        self._calls = getattr(self, "_calls", 0) + 1
        generator = torch.Generator().manual_seed(self._calls)
        return torch.randint(3, 90, (4,), generator=generator).tolist()


class Interleaved(Noise):
    """Gives all prompts once, and then all again."""

    def __call__(
        self, policy: Any, prompts: Sequence[Any], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        return super().__call__(policy, [*prompts] * num_generations, 1, temperature=temperature)


class Values(nn.Module):
    """Values of the token before each sampled one."""

    on_trunk = False
    at = 0

    def __init__(self, trunk: Any):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.hidden_size, 1, dtype=torch.float64)

    def forward(self, batch: TokenBatch, states: None) -> Tensor:
        input_ids, before = batch.padded
        hidden = self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(hidden.flatten(0, 1)[before + self.at]).squeeze(-1)


class OwnCritic(TrainedCritic):
    """A right critic, to be made wrong."""

    name = "wrong"

    def build(self, policy: Any, algorithm: Any) -> Any:
        return Values(copy.deepcopy(policy.base_model))


class Late(Values):
    """Reads after the token that is to be judged."""

    at = 1


class LateCritic(OwnCritic):
    """Values of the state after the token, which know what was chosen (verl-project/verl#1758)."""

    def build(self, policy: Any, algorithm: Any) -> Any:
        return Late(copy.deepcopy(policy.base_model))


class MeanState(Values):
    """Judges every state by the mean over the whole text (lucidrains/PaLM-rlhf-pytorch#42)."""

    def forward(self, batch: TokenBatch, states: None) -> Tensor:
        hidden = self.trunk(input_ids=batch.padded[0], use_cache=False).last_hidden_state.mean(1)
        return self.head(hidden[batch.rows]).squeeze(-1)


class PooledCritic(OwnCritic):
    """Values of the whole text, padding included."""

    def build(self, policy: Any, algorithm: Any) -> Any:
        return MeanState(copy.deepcopy(policy.base_model))


class SharedCritic(OwnCritic):
    """Takes the policy's own trunk among its parameters: two optimizer groups hold it."""

    def build(self, policy: Any, algorithm: Any) -> Any:
        return Values(policy.base_model)


class Column(Values):
    """Forgets to squeeze."""

    def forward(self, batch: TokenBatch, states: None) -> Tensor:
        return super().forward(batch, states).unsqueeze(1)


class ColumnCritic(OwnCritic):
    """Values (n, 1), which broadcast against (n,) to (n, n)."""

    def build(self, policy: Any, algorithm: Any) -> Any:
        return Column(copy.deepcopy(policy.base_model))


class Freezing(Critic):
    """Freezes the policy while it builds."""

    name = "wrong"

    def build(self, policy: Any, algorithm: Any) -> Any:
        policy.requires_grad_(False)


class Shared(Reference):
    """Takes the policy itself for the reference."""

    name = "wrong"

    def build(self, policy: Any) -> Any:
        return policy


class Linked(Reference):
    """Freezes a copy that holds the policy's own weights."""

    name = "wrong"

    def build(self, policy: Any) -> Any:
        other = copy.copy(policy)
        other._modules = dict(policy._modules)
        return other.eval()


class Copied(Reference):
    """A frozen copy, to be moved wrongly."""

    name = "wrong"
    moves = True

    def build(self, policy: Any) -> Any:
        return copy.deepcopy(policy).eval().requires_grad_(False)


class Still(Copied):
    """Says that it moves and does not."""


class Backwards(Copied):
    """Moves the policy to the reference."""

    def move(self, model: Any, policy: Any, step: int) -> None:
        policy.load_state_dict(model.state_dict())


class Halved(UpdateRule):
    """Leaves the critic to nobody."""

    name = "wrong"

    def build(self, policy: Any, groups: list[dict[str, Any]]) -> Any:
        return torch.optim.SGD(policy.parameters(), lr=1e-3)


class FirstGroup(UpdateRule):
    """Takes the first of the critic's parameter groups and forgets the others."""

    name = "wrong"

    def build(self, policy: Any, groups: list[dict[str, Any]]) -> Any:
        critic = {id(p) for group in groups for p in group["params"]}
        own = [p for p in policy.parameters() if id(p) not in critic]
        return torch.optim.SGD([*([{"params": own}] if own else []), groups[0]], lr=1e-3)


class Exploding(UpdateRule):
    """Takes a step without bound."""

    name = "wrong"

    def build(self, policy: Any, groups: list[dict[str, Any]]) -> Any:
        critic = {id(p) for group in groups for p in group["params"]}
        own = [p for p in policy.parameters() if id(p) not in critic]
        return torch.optim.SGD([{"params": own, "lr": float("inf")}, *groups], lr=1e-3)


MUTANTS = [
    Mutant(Short, "answers", "3 numbers for 4 rows"),
    Mutant(Texts, "answers", "neither a number nor None"),
    Mutant(Alone, "answers", "got float"),
    Mutant(Infinite, "answers", "is infinite"),
    Mutant(FewTokens, "answers", "token scores for"),
    Mutant(Beyond, "answers", "steps end at"),
    Mutant(OtherColumn, "answers", "Pass rollouts="),
    Mutant(Clearing, "pure reward", "changes rollouts.completions"),
    Mutant(Counted, "state after", r"state_dict\(\)\['seen'\] must .* got collections.deque"),
    Mutant(Ranked, "rows", "reversed rows score"),
    Mutant(Compared, "alone", "Remove rowwise = True"),
    Mutant(remembering, "sent", "a copy made from its settings"),
    Mutant(FirstProcess, "ranks", "as process 1 of 2"),
    Mutant(Logging, "logs", "1 values of 'judge' for 4 rows"),
    Mutant(NoneIsZero, "none", "is not a wrong answer"),
    Mutant(NumberAnswer, "answer", "must be text or None"),
    Mutant(Vouching, "exact", "differ from a forward of the policy"),
    Mutant(OwnCount, "completions", "not its own setting", ("starts",)),
    Mutant(OutOfOrder, "starts", "whose completions are"),
    Mutant(EmptyRow, "completions", "is empty"),
    Mutant(WithoutEos, "completions", "logps must have one number per completion token"),
    Mutant(Training, "model", "in training mode"),
    Mutant(OwnGenerator, "repeats", "Draw from the global generators", ("starts",)),
    Mutant(Interleaved, "greedy", "together and to"),
    Mutant(LateCritic, "causal", "Read at the token before"),
    Mutant(PooledCritic, "causal", "Read at the token before", ("neighbours",)),
    Mutant(SharedCritic, "learns", "the policy's own"),
    Mutant(ColumnCritic, "values", "values must have shape"),
    Mutant(Freezing, "learns", "which of the policy's weights learn"),
    Mutant(Shared, "stays", "parameters that require grad"),
    Mutant(Linked, "stays", "parameters that require grad"),
    Mutant(Still, "moves", "as far from the policy as before"),
    Mutant(Backwards, "moves", "as far from the policy as before|the reference moved"),
    Mutant(Halved, "steps", "leaves out the critic"),
    Mutant(FirstGroup, "holds", "it holds 3 of"),
    Mutant(Exploding, "steps", "not finite"),
]
