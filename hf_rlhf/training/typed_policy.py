"""Play episodes of a recipe in the policy's place: what somebody types becomes the policy's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from operator import eq
from typing import Any

from hf_rlhf.axes import RolloutEngine
from hf_rlhf.batch import Completions, Prompt, Rollouts, Spans
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.plugin_tree import walk
from hf_rlhf.config.recipe import Recipe
from hf_rlhf.contract.environment import AGENT
from hf_rlhf.data.model_loading import load_config, load_tokenizer
from hf_rlhf.data.prompts import check_columns, load_prompts, prompt_room, read_columns
from hf_rlhf.data.token_text import Span, pieces_of, spans_of
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.scoring.scorer import Scorer
from hf_rlhf.training.early_checks import check_prompts
from hf_rlhf.training.environments.template_checks import template_problems, tool_tokens
from hf_rlhf.training.environments.workers import close_here
from hf_rlhf.training.plugin_setup import context_of, plugins_here, set_up
from hf_rlhf.training.sampling import Sampling
from hf_rlhf.training.tag_checks import tag_problems

STREAMED = 1000
"""Rows of a stream that can be played."""
Say = Callable[[str, str | None], str]
"""Gets the text that was added since the last turn, and which of several agents is asked; returns the text of the next one."""


@dataclass(kw_only=True)
class TypedTurns(RolloutEngine):
    """Asks `say` for each turn; its text and the end-of-sequence token are the sampled tokens."""

    name = "typed"

    max_new_tokens: int | None
    say: Say
    shown: list[tuple[str | None, int, list[int]]] = field(default_factory=list)
    """For each turn of the episode, its agent, how many tokens it was asked with, and these with what was said."""

    def __call__(
        self, policy: Any, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        turns = [self._turn(policy.tokenizer, prompt) for prompt in prompts for _ in range(num_generations)]
        return Completions(ids=[ids for ids, _ in turns], finish_reasons=[reason for _, reason in turns])

    def _turn(self, tokenizer: Any, prompt: Prompt) -> tuple[list[int], str]:
        (pieces,), agent = pieces_of(tokenizer, [prompt.ids]), prompt.columns.get(AGENT)
        said = self.say("".join(pieces[self._known(agent, prompt.ids) :]), agent)
        ids = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        most = prompt.max_new_tokens or self.max_new_tokens
        self.shown.append((agent, len(prompt.ids), [*prompt.ids, *ids[:most]]))
        return ids[:most], "stop" if most is None or len(ids) <= most else "length"

    def _known(self, agent: str | None, ids: list[int]) -> int:
        """Return how many of the tokens an earlier turn of the agent has shown or said, in a conversation that this one
        continues."""
        own = [(asked, whole) for who, asked, whole in self.shown if who == agent]
        equal = [(asked, sum(takewhile(bool, map(eq, whole, ids)))) for asked, whole in own]
        return max((known for asked, known in equal if known >= asked), default=0)


class _Typist(Policy):
    """A policy without a model."""

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


@dataclass(kw_only=True)
class PlayedRow:
    """A row of an episode that was played, as training would have it."""

    parts: list[tuple[str, Span]]
    """Titles and tokens: prompt, mask 1, mask 0, and fork for the context that follows in place of what stands before it."""
    columns: dict[str, Any]
    finish_reason: str
    rewards: dict[str, tuple[float, float | None]]
    """Weight and score of each reward source; None where it gave none."""
    reason: str
    """Reason why no source scored it, else empty."""

    @property
    def total(self) -> float | None:
        """Sum of the weighted scores before clips and normalization; None without any."""
        given = [weight * score for weight, score in self.rewards.values() if score is not None]
        return sum(given) if given else None


@dataclass(kw_only=True)
class Table:
    """Environments, rewards and prompts of a recipe, set up without its model."""

    recipe: Recipe
    algorithm: Algorithm
    prompts: Sequence[Prompt]
    policy: Any
    scorer: Scorer
    sampling: Sampling
    turns: TypedTurns

    def play(self, row: int) -> list[PlayedRow]:
        """Play the episode of a prompt, by its number from 0. Returns a row for each agent."""
        self.turns.shown.clear()
        place = (self.recipe.training.get("seed", 42), "play", row)
        with seeded(*place):
            _, rollouts = self.sampling([self.prompts[row]], [row], 1, self.algorithm.rollout.temperature, place)
            results = self.scorer.ask(rollouts, *place, counts=False)
        weights = {x: y.weight for x, y in zip(self.algorithm.labels(), self.algorithm.rewards, strict=True)}
        return [
            PlayedRow(
                parts=self._parts(rollouts, i),
                columns={name: values[i] for name, values in rollouts.columns.items()},
                finish_reason=rollouts.finish_reasons[i],
                rewards={label: (weights[label], _number(result.answers[i])) for label, result in results.items()},
                reason="; ".join(
                    reason
                    for reason in (
                        *self.sampling.reasons,
                        *(failure.reason for x in results.values() for failure in x.failures if failure.row == i),
                    )
                    if reason
                ),
            )
            for i in range(len(rollouts))
        ]

    def _parts(self, rollouts: Rollouts, row: int) -> list[tuple[str, Span]]:
        tokenizer, ids, mask = self.policy.tokenizer, rollouts.completion_ids[row], rollouts.masks[row]
        forks = rollouts.forks[row] if rollouts.forks else []
        contexts = [(0, rollouts.prompt_ids[row]), *forks]
        ends = [*(start for start, _ in forks), len(ids)]
        parts: list[tuple[str, Span]] = []
        for number, ((start, context), end) in enumerate(zip(contexts, ends, strict=True)):
            text = "".join(pieces_of(tokenizer, [list(context)])[0])
            parts.append(("fork" if number else "prompt", Span(0, len(context), text)))
            parts += [(f"mask {span.mask}", span) for span in spans_of(tokenizer, ids[start:end], mask[start:end])]
        return parts


def _number(answer: Any) -> float | None:
    """Return the score of a row: the sum over its steps or tokens; None where a source gave none."""
    if isinstance(answer, float | int):
        return None if math.isnan(answer) else float(answer)
    return sum(value for _, value in answer.values) if isinstance(answer, Spans) else sum(answer.values)


@contextmanager
def opened(recipe: Recipe, say: Say, held_out: bool = False, trust_remote_code: bool = False) -> Iterator[Table]:
    """Set up the environments and rewards of a recipe, without its model. Raises `UserError` for what training refuses.

    `held_out`: play the held-out rows in place of those that are trained on.
    """
    from accelerate import Accelerator

    args, chosen = recipe.training_arguments(), recipe.algorithm()
    try:
        tokenizer, prompts = _checked(recipe, chosen, held_out, trust_remote_code)
    except (ValueError, OSError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    turns = TypedTurns(
        max_new_tokens=getattr(chosen.rollout, "max_new_tokens", None),
        say=say,
        temperature=chosen.rollout.temperature,
        skip_special_tokens=chosen.rollout.skip_special_tokens,
    )
    algorithm = replace(chosen, rollout=turns)
    policy = _Typist(model=None, tokenizer=tokenizer, device=args.device)
    context = context_of(None, tokenizer, recipe.model, args)
    plugins, scorer = list(plugins_here(algorithm, _playing(algorithm))), None
    accelerator = Accelerator(cpu=args.use_cpu)
    try:
        for plugin in plugins:
            set_up(plugin, algorithm, context, accelerator.autocast())
        scorer = Scorer(list(zip(algorithm.labels(), algorithm.rewards, strict=True)), context)
        scorer.wait()
        yield Table(
            recipe=recipe,
            algorithm=algorithm,
            prompts=prompts,
            policy=policy,
            scorer=scorer,
            sampling=Sampling(algorithm=algorithm, policy=policy, accelerator=accelerator),
            turns=turns,
        )
    finally:
        if scorer is not None:
            scorer.close()
        for plugin in plugins:
            close_here(plugin)


def _playing(algorithm: Algorithm) -> list[tuple[str, Any]]:
    """Return the plugins that play and score, with their dotted paths, nested ones included."""
    return list(walk({"environment": algorithm.environment, "rewards": algorithm.rewards}))


def _checked(recipe: Recipe, algorithm: Algorithm, held_out: bool, trust: bool) -> tuple[Any, Sequence[Prompt]]:
    """Return the tokenizer and the prompts. Raises `ValueError` or `UserError` for what cannot be played."""
    if problems := algorithm.problems():
        raise UserError("this recipe is refused:\n" + "\n".join(f"  - {problem}" for problem in problems))
    check_columns(read_columns(recipe.dataset)[0], [plugin for _, plugin in _playing(algorithm)])
    tokenizer = load_tokenizer(recipe.model, trust)
    config = load_config(recipe.model.path, recipe.model.revision, trust_remote_code=trust)
    room = prompt_room(config, recipe.dataset, algorithm)
    tools = tool_tokens(algorithm, tokenizer)
    rows = load_prompts(recipe.dataset, tokenizer, max_prompt_tokens=room, tool_tokens=tools)[held_out]
    if rows is None:
        raise UserError("no rows are held out of the dataset. Leave --held-out out")
    check_prompts(rows, algorithm, recipe.model.chat_template_kwargs)
    if problems := [*tag_problems(algorithm, tokenizer), *template_problems(algorithm, tokenizer, rows)]:
        raise UserError("\n".join(problems))
    return tokenizer, rows if isinstance(rows, Sequence) else list(islice(rows, STREAMED))
