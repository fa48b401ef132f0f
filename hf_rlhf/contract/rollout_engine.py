"""Base class of the axis `rollout`, the weights that an engine may take, and its session over several turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_rlhf.batch import Completions, Prompt
from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Count, Plugin, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.contract.algorithm_view import Algorithm
    from hf_rlhf.contract.model_settings import Model
    from hf_rlhf.modeling.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The policy's weights, for an engine that samples from a copy of them."""

    policy: Policy
    named: Callable[[], Iterator[tuple[str, Tensor]]]
    """Yields (name, whole tensor) of each parameter and persistent buffer. All processes iterate together; the tensors are the
    policy's own."""

    @property
    def version(self) -> str:
        """`Policy.version` of these weights."""
        return self.policy.version


class Pending:
    """Completions that an engine was asked for. The default asks for them when they are waited for."""

    def __init__(self, call: Callable[[], Completions], prompts: int):
        self._call, self._prompts = call, prompts
        self._whole: Completions | None = None

    def __iter__(self) -> Iterator[tuple[int, Completions]]:
        """Yield (number of a prompt, its completions) of each prompt, as they land."""
        whole = self.result()
        group = len(whole.ids) // self._prompts
        for i in range(self._prompts):
            yield i, whole.select(slice(i * group, (i + 1) * group))

    def result(self) -> Completions:
        """Return all completions, in the order of the prompts, when they have landed."""
        if self._whole is None:
            self._whole = self._call()
        return self._whole


@dataclass(kw_only=True)
class RolloutEngine(Plugin, ABC):
    """Sample completions. Axis `rollout`."""

    axis = Axis(section="Rollouts", metric_prefix="rollout")

    deterministic: ClassVar[bool] = True
    """False if equal requests may have other answers when others are served beside them: a resumed run may then differ."""
    local: ClassVar[bool] = True
    """False if it samples from a copy of the weights, which it gets by `load`. Its log-probs, where it reports them, are then
    compared with the policy's in every rollout."""

    prompts: Count = 32
    """Prompts per rollout, over all processes (verl: train_batch_size)."""
    num_generations: Count = 8
    """Completions per prompt, the group size G (verl: rollout.n)."""
    temperature: Positive = 1.0
    """Sampling temperature; log-probs are computed at it everywhere."""
    skip_special_tokens: bool = True
    """Hide special tokens from rewards. The final end-of-sequence token is always hidden."""

    @property
    def exact_logps(self) -> bool:
        """True if it may report log-probs with `Completions.exact`."""
        return False

    @abstractmethod
    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        """Return `num_generations` completions of each prompt, rows of a prompt adjacent.

        `temperature` replaces the setting for this call; 0 is greedy. Random numbers come from the global generators, which
        the core seeds for the call. `policy.version` names the weights: those of the last `load`.
        """

    def start(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Pending:
        """Ask for what a call returns, and return what waits for it. An engine that samples elsewhere overrides it and draws the
        random numbers here; the default makes the call when it is waited for."""
        call = partial(self, policy, prompts, num_generations, temperature=temperature)
        return Pending(call, len(prompts))

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield a note for the plan where a resumed run may differ."""
        yield from self.differences(algorithm)

    def differences(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield why a resumed run may sample other tokens than one that was not stopped."""
        if self.samples_freely and not self.deterministic and algorithm.environment:
            yield (
                "episodes run free, their requests are served beside others: a resumed run repeats them only as far "
                "as the engine answers equal requests alike"
            )

    async def sample(
        self, policy: Policy, row: int, prompt: Prompt, *, temperature: float | None = None
    ) -> Completions:
        """Return one completion of a prompt, drawn from `prompt.seed`. `row` numbers the conversation that it continues.

        An engine that serves requests one by one may override it: the episodes of environments then run free, each question is
        put when it is asked, many at a time, on an event loop in a thread. Without it they advance in lockstep (`session`).
        """
        raise NotImplementedError

    @property
    def samples_freely(self) -> bool:
        """Return whether it has `sample`."""
        return type(self).sample is not RolloutEngine.sample

    def load(self, weights: Weights) -> None:
        """Take the policy's weights, from which the calls that follow sample. Called on all processes together, between
        `wake("weights")` and `wake("cache")`, whenever `Policy.version` has changed. An error on one process ends the run on all.
        """

    def settled(self) -> dict[str, Any]:
        """Return settings whose values `setup` has chosen, as a checkpoint keeps them: a run that resumes must find the same."""
        return {}

    def serve_commands(
        self, model: Model, dtype: str, prompt_tokens: int | None
    ) -> list[tuple[dict[str, str], list[str]]]:
        """Return how to start each of the engine's servers: environment variables, in which `$NAME` stands for the variable
        NAME, and the arguments of Python. None by default: the engine has no server.

        `model.path` is a folder or a name on the Hub. `prompt_tokens`: bound of the prompts, None if there is none.
        """
        return []

    @contextmanager
    def session(self, policy: Policy, *, temperature: float | None = None) -> Iterator[Session]:
        """Open a `Session` for the turns of one rollout's episodes. An engine that keeps keys and values of live rows returns
        its own; the default calls the engine with all tokens so far."""
        yield Session(self, policy, temperature)

    def wake(self, part: Literal["weights", "cache"]) -> None:
        """Prepare for calls of a rollout or evaluation: first "weights", then "cache". `policy.version` stays till `sleep`."""

    def sleep(self) -> None:
        """Release what the engine holds on the device; called after those calls, even if one of them raised."""


class Session:
    """Continue rows over several turns, by whole calls of the engine."""

    def __init__(self, engine: RolloutEngine, policy: Policy, temperature: float | None):
        self.engine, self.policy, self.temperature = engine, policy, temperature

    def ask(self, rows: Sequence[int], prompts: Sequence[Prompt], num_generations: int = 1) -> Completions:
        """Return `num_generations` continuations of each prompt, for the rows numbered `rows`, adjacent ones per prompt.

        `Prompt.ids` are all tokens of a row so far; a continuation longer than its `Prompt.max_new_tokens` is cut by the core.
        Random numbers come from the global generators, which the core seeds for each call.
        """
        return self.engine(self.policy, prompts, num_generations, temperature=self.temperature)

    def drop(self, row: int) -> None:
        """Forget a row, which is not asked again."""
