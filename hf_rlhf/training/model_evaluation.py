"""Evaluate saved models as a run evaluates its own: the same prompts, sampling, rewards and random numbers.

A model at a time is in memory. What a model is asked, and whether it can be, is checked for all of them before the first loads.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hf_rlhf.batch import Prompt
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.hub_names import check_hub_names
from hf_rlhf.config.overrides import apply_overrides
from hf_rlhf.config.plugin_tree import walk
from hf_rlhf.config.recipe import OfflineRecipe, Recipe, load_recipe, read_recipe, resolve
from hf_rlhf.config.recipe_yaml import OFFLINE
from hf_rlhf.config.training_arguments import check_arguments
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import ModelError, load_config, load_model, load_tokenizer, model_path
from hf_rlhf.data.prompts import check_columns, load_prompts, prompt_room, read_columns, read_rows
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.scoring.normalization import RewardNormalizer
from hf_rlhf.scoring.scorer import Scorer
from hf_rlhf.training.collector import Collector
from hf_rlhf.training.early_checks import check_prompts
from hf_rlhf.training.environments.template_checks import tool_tokens
from hf_rlhf.training.environments.workers import close_here
from hf_rlhf.training.evaluation import Evaluated, evaluate, row_types
from hf_rlhf.training.held_out_rows import kept_rows
from hf_rlhf.training.model_checks import check_causal, check_vocabulary
from hf_rlhf.training.plugin_setup import context_of, plugins_here, policy_of, set_up
from hf_rlhf.training.tag_checks import tag_problems

SHARED = ("rollout", "environment", "rewards", "dataset", "evaluation")
"""Keys on which runs must agree to be evaluated by the recipe of the first."""
WEIGHTS = ("config.json", "adapter_config.json")


@dataclass(kw_only=True)
class Subject:
    """A model to evaluate."""

    word: str
    """As it was named."""
    label: str
    """A short name that no other model has."""
    path: str
    recipe: dict[str, Any] | None
    """The recipe of its run; None for a model without one."""
    tokenizer: Any = None
    prompts: Sequence[Prompt] = ()


def find_subjects(words: Sequence[str]) -> list[Subject]:
    """Return the models that words name: a run's or a checkpoint's folder, a model's folder, or a name on the Hub.

    Raises `UserError` for one that is not there, and for a run without a final model.
    """
    labels = ["/".join(Path(word).parts[-2 if Path(word).name.startswith("checkpoint-") else -1 :]) for word in words]
    made = []
    for word, short in zip(words, labels, strict=True):
        folder, recipe = Path(word).expanduser(), None
        if (folder / checkpoint_manifest.MANIFEST).is_file():
            recipe = checkpoint_manifest.verify(folder)["recipe"]
        elif (folder / "recipe.yaml").is_file():
            recipe = read_recipe(folder / "recipe.yaml")
            if not any((folder / name).is_file() for name in WEIGHTS):
                inside = checkpoint_manifest.in_order(folder)
                fix = f"Evaluate its checkpoint {inside[-1]}" if inside else "Train it to its end"
                raise UserError(f"the run {word} has no final model. {fix}")
        label = short if labels.count(short) == 1 else word
        made.append(Subject(word=word, label=label, path=model_path(word), recipe=recipe))
    if twice := next((x.word for i, x in enumerate(made) if x.path in [y.path for y in made[:i]]), None):
        raise UserError(f"{twice} is named twice. Name each model once")
    return made


def recipe_of(subjects: Sequence[Subject], name: str | None, overrides: Sequence[str]) -> Recipe:
    """Return the recipe `name`, or that of the first run with rollouts, with overrides.

    Raises `UserError` where such runs measure differently, and without any.
    """
    if name is not None:
        recipe = load_recipe(name, overrides)
    else:
        all_runs = [subject for subject in subjects if subject.recipe is not None]
        runs = [subject for subject in all_runs if OFFLINE not in (subject.recipe or {})] or all_runs[:1]
        if not runs:
            raise UserError(
                f"{subjects[0].word} is not a run, so a recipe has to say what to ask and how to score. Pass --recipe NAME"
            )
        for other in runs[1:]:
            if differing := [key for key in SHARED if _measured(other, key) != _measured(runs[0], key)]:
                raise UserError(
                    f"the runs {runs[0].word} and {other.word} must be measured alike, but their recipes differ in "
                    f"{', '.join(differing)}. Choose one with --recipe {runs[0].word}/recipe.yaml"
                )
        raw, notes = apply_overrides(runs[0].recipe or {}, overrides)
        recipe = resolve(raw, name=runs[0].label)
        recipe.notes = notes
    if isinstance(recipe, OfflineRecipe):
        raise UserError(
            f"the recipe {recipe.name} trains on a dataset and samples nothing. Pass --recipe with one that has rewards, such as "
            "--recipe grpo"
        )
    return recipe


def _measured(subject: Subject, key: str) -> Any:
    """Return what a run's recipe says of a key, without the sizes of its rollouts in training."""
    value: Any = (subject.recipe or {}).get(key)
    if key == "rollout" and isinstance(value, dict):
        return {k: x for k, x in value.items() if k not in ("prompts", "num_generations")}
    return value


def model_settings(model: Model, subject: Subject) -> Model:
    """Return a recipe's `model` for another model; one with a tokenizer of its own uses that."""
    folder = Path(subject.path)
    own = folder.is_dir() and any(folder.glob("tokenizer*.json"))
    same = model.path is not None and model_path(model.path) == subject.path
    return replace(
        model,
        path=subject.path,
        tokenizer=None if own else model.tokenizer,
        revision=model.revision if same else None,
        lora=None,
    )


def check_writes(subject: Subject, settings: Model, trust_remote_code: bool) -> Any:
    """Return a model's configuration. Raises `ModelError` for a classifier."""
    config = load_config(settings.path, settings.revision, trust_remote_code=trust_remote_code)
    if kind := next((x for x in config.architectures or () if "Classification" in x), None):
        raise ModelError(f"{subject.word} is a {kind}, which writes nothing. Name a language model")
    return config


@dataclass(kw_only=True)
class Evaluator:
    """Evaluates models one after the other by a recipe."""

    recipe: Recipe
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.args = self.recipe.training_arguments()
        check_arguments(self.args)
        algorithm = self.recipe.algorithm()
        if problems := algorithm.problems():
            raise UserError("this recipe is refused:\n" + "\n".join(f"  - {problem}" for problem in problems))
        check_hub_names([("dataset", self.recipe.dataset), *_measuring(algorithm)])
        dataset = own = self.recipe.dataset
        if dataset.eval_path is not None:  # all of it, and nothing else is read
            own = replace(dataset, path=dataset.eval_path, split=dataset.eval_split or "train")
        self.dataset = replace(own, eval_path=None, eval_split=None, held_out=0)
        rows: Any = read_rows(dataset)[1] if dataset.eval_path is None else read_rows(self.dataset)[0]
        if rows is None:
            raise UserError(
                "no rows to evaluate on: nothing is held out of the dataset. Pass --dataset FILE, or set dataset.eval_split"
            )
        self.rows = rows
        columns, *_ = read_columns(self.dataset, self.rows)
        check_columns(columns, [plugin for _, plugin in _measuring(algorithm)])

    def prepare(self, subject: Subject) -> None:
        """Load the tokenizer and make the prompts. Raises `ValueError` or `UserError` for what cannot be evaluated."""
        settings, algorithm = model_settings(self.recipe.model, subject), self.recipe.algorithm()
        config = check_writes(subject, settings, self.trust_remote_code)
        subject.tokenizer = load_tokenizer(settings, self.trust_remote_code)
        if problems := tag_problems(algorithm, subject.tokenizer):
            raise UserError("\n".join(problems))
        room = prompt_room(config, self.dataset, algorithm)
        bounds: dict[str, Any] = {"max_prompt_tokens": room, "tool_tokens": tool_tokens(algorithm, subject.tokenizer)}
        made, _ = load_prompts(self.dataset, subject.tokenizer, train=self.rows, **bounds)
        check_prompts(made, algorithm, settings.chat_template_kwargs)
        subject.prompts = list(islice(made, self.recipe.evaluation.prompts))

    def evaluate(self, subject: Subject, rows: Path | None = None) -> Evaluated:
        """Load a prepared model and evaluate it. `rows`: Parquet file for the rows of all processes."""
        settings = self.recipe.evaluation
        with self._collector(subject) as collector:
            if rows is None:
                return evaluate(collector, subject.prompts, settings)
            types = row_types(collector.algorithm)
            with kept_rows(rows, types, collector.accelerator, settings.num_generations) as keep:
                return evaluate(collector, subject.prompts, settings, keep)

    @contextmanager
    def _collector(self, subject: Subject) -> Iterator[Collector]:
        """Load a model, set up what samples and scores, and free all of it after the block."""
        from accelerate import Accelerator
        from transformers import enable_full_determinism, set_seed

        (enable_full_determinism if self.args.full_determinism else set_seed)(self.args.seed)
        settings, algorithm, args = model_settings(self.recipe.model, subject), self.recipe.algorithm(), self.args
        model: Any = load_model(settings, self.trust_remote_code, lora=True, keep_adapter=True)
        if "double_backward" in algorithm.needs:  # as in training
            model.set_attn_implementation("eager")
        check_causal(model)
        check_vocabulary(subject.tokenizer, model)
        actor_critic = ActorCritic(model, None, algorithm.rollout.temperature).to(args.device)
        policy = policy_of(model, subject.tokenizer, algorithm, args)
        policy.version = subject.path
        context = context_of(model, subject.tokenizer, settings, args)
        accelerator, scorer = Accelerator(cpu=args.use_cpu), None
        opened = list(plugins_here(algorithm, _measuring(algorithm)))
        try:
            for plugin in opened:
                set_up(plugin, algorithm, context, accelerator.autocast())
            scorer = Scorer(list(zip(algorithm.labels(), algorithm.rewards, strict=True)), context)
            unused: Any = None
            yield Collector(
                algorithm=algorithm,
                policy=policy,
                actor_critic=actor_critic,
                forwards=unused,
                scorer=scorer,
                normalizer=RewardNormalizer(list(scorer.sources.items())),
                accelerator=accelerator,
                stream=unused,
                meters=MetricAggregator(args.device),
                recorder=unused,
                seed=args.seed,
            )
        finally:
            if scorer is not None:
                scorer.close()
            for plugin in opened:
                close_here(plugin)
            del model, actor_critic, policy, context, scorer
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _measuring(algorithm: Algorithm) -> list[tuple[str, Any]]:
    """Return the plugins that sample and score, with their dotted paths, nested ones included."""
    return list(
        walk({"rollout": algorithm.rollout, "environment": algorithm.environment, "rewards": algorithm.rewards})
    )


def prompt_keys(prompts: Sequence[Prompt]) -> list[str]:
    """Return a key for each prompt with its columns; equal ones are numbered. Models with different tokenizers share them."""
    seen: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        text = json.dumps([prompt.prompt, prompt.columns], sort_keys=True, default=str)
        seen[text] = seen.get(text, -1) + 1
        keys.append(f"{seen[text]} {text}")
    return keys
