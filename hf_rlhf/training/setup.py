"""Setup of a run: check everything, then load tokenizer, prompts and model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.hub_names import check_hub_names
from hf_rlhf.config.optimizer_arguments import optimizer_problems
from hf_rlhf.config.plan import Plan, make_plan, plugin_remarks, recipe_remarks
from hf_rlhf.config.plan_in_words import Counts, in_words
from hf_rlhf.config.recipe import Recipe
from hf_rlhf.config.schedule import device_of, device_problems
from hf_rlhf.config.sections import SECTIONS, Dataset, Evaluation, Logging
from hf_rlhf.config.sharding import process_problems, sharding_problems
from hf_rlhf.config.training_arguments import DEFAULTS, check_arguments, training_of
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.adapters import adapted_model_problems, add_adapter, config_problems
from hf_rlhf.data.model_loading import (
    disable_dropout,
    load_config,
    load_model,
    load_tokenizer,
    lora_config,
    prepare_tokenizer,
)
from hf_rlhf.data.prompt_stream import order_problem
from hf_rlhf.data.prompts import Prompts, StreamedPrompts, check_columns, load_prompts, prompt_room, read_columns
from hf_rlhf.data.quantization import is_quantised, model_problems
from hf_rlhf.modeling.policy import ActorCritic, Policy
from hf_rlhf.modeling.sharding import WholeModel
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.runtime.versions import versions
from hf_rlhf.scoring.scorer import Scorer
from hf_rlhf.training.early_checks import check_prompts, warn_of_ragged_epochs
from hf_rlhf.training.environments.template_checks import template_problems, tool_tokens
from hf_rlhf.training.hub_trainer import ask_for_repository
from hf_rlhf.training.losses import build_critic
from hf_rlhf.training.model_checks import (
    check_causal,
    check_trained,
    check_vocabulary,
    dtype_problems,
    dtype_remarks,
    known_model,
    router_problems,
    with_router_balance,
)
from hf_rlhf.training.offload_checks import offload_problems, offload_remarks, policy_state
from hf_rlhf.training.plugin_setup import context_of, plugins_here, policy_of, set_up
from hf_rlhf.training.references import References
from hf_rlhf.training.resumable_settings import resumable_settings
from hf_rlhf.training.tag_checks import tag_problems, tag_problems_by_name, token_problems

if TYPE_CHECKING:
    from transformers import TrainingArguments


class AlgorithmError(ValueError):
    """Raised for a combination of plugins that cannot run or cannot learn."""


@dataclass(kw_only=True)
class RunComponents:
    """Components of a trainer."""

    algorithm: Algorithm
    sections: dict[str, Any]
    plan: Plan
    record: dict[str, Any]
    model: Any
    tokenizer: Any
    room: dict[str, Any]
    """`load_prompts`' bounds of prompts, in tokens."""
    train: Any = None
    evaluation: Any = None

    @property
    def dataset_settings(self) -> Dataset:
        """The recipe's `dataset`."""
        return self.sections["dataset"]

    @property
    def evaluation_settings(self) -> Evaluation:
        """The recipe's `evaluation`."""
        return self.sections["evaluation"]

    @property
    def logging_settings(self) -> Logging:
        """The recipe's `logging`."""
        return self.sections["logging"]

    def as_prompts(self, rows: Any) -> Any:
        """Return rows of another dataset as prompts, by the recipe's `dataset`; prompts are returned unchanged."""
        if isinstance(rows, dict):
            return {name: self.as_prompts(part) for name, part in rows.items()}
        if isinstance(rows, Prompts | StreamedPrompts):
            return rows
        settings = replace(self.dataset_settings, held_out=0)
        check_columns(read_columns(settings, rows)[0], [plugin for _, plugin in self.algorithm.plugins()])
        return load_prompts(settings, self.tokenizer, train=rows, **self.room)[0]

    def build(self, model: Any, args: TrainingArguments) -> tuple[ActorCritic, References]:
        """Build policy with critic, and the references. New weights of the critic depend on the seed alone."""
        a = self.algorithm
        with seeded(args.seed, "critic"):
            critic = build_critic(a, model, self.sections["model"].dropout)
        actor_critic = ActorCritic(model, None, a.rollout.temperature).to(args.device)
        actor_critic.critic = None if critic is None else critic.to(device_of(a.critic, args.device))
        check_trained(actor_critic, "policy and critic" if critic is not None else "the policy")
        check_causal(model)
        return actor_critic, References.build(a, model, args.device)

    def policy(self, model: Any, args: TrainingArguments, whole: WholeModel | None) -> Policy:
        """Return the policy as rollout engines get it. `whole`: its twin, if it is sharded."""
        return policy_of(model, self.tokenizer, self.algorithm, args, whole)

    def set_up(self, model: Any, args: TrainingArguments, autocast: AbstractContextManager[None]) -> Scorer:
        """Call `setup` of every plugin, that of the rollout engine in `autocast`, and start reward sources in their workers.

        Remarks that a plugin adds after its setup go into the plan.
        """
        longest = getattr(self.train, "longest", None)
        context = context_of(model, self.tokenizer, self.sections["model"], args, self.algorithm.longest_turn(longest))
        for plugin in plugins_here(self.algorithm, self.algorithm.plugins()):
            set_up(plugin, self.algorithm, context, autocast)
        known = self.plan.remarks
        known += [remark for remark in plugin_remarks(self.algorithm) if remark not in known]
        self.record["plan"]["remarks"] = list(known)
        self.record["algorithm"]["rollout"] |= self.algorithm.rollout.settled()
        return Scorer(list(zip(self.algorithm.labels(), self.algorithm.rewards, strict=True)), context)


def default_arguments(recipe: Algorithm | Recipe) -> TrainingArguments:
    """Return the recipe's TrainingArguments; for an algorithm, the defaults of a recipe in the folder `outputs`."""
    if isinstance(recipe, Recipe):
        return recipe.training_arguments()
    from transformers import TrainingArguments

    return TrainingArguments(output_dir="outputs", **DEFAULTS)


def setup_run(
    model: Any,
    recipe: Algorithm | Recipe,
    args: TrainingArguments,
    train: Any,
    evaluation: Any,
    tokenizer: Any,
    peft_config: Any,
    trust_remote_code: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
) -> RunComponents:
    """Check algorithm, arguments and dataset, in that order, then load tokenizer, prompts and model.

    `on_plan` gets the plan, with a memory forecast, once nothing but the model can fail.
    """
    chosen = recipe if isinstance(recipe, Algorithm) else recipe.algorithm()
    sections = {k: cls() for k, cls in SECTIONS.items()} if isinstance(recipe, Algorithm) else dict(recipe.sections)
    model_settings: Model = sections["model"]
    if isinstance(model, str):
        sections["model"] = model_settings = replace(model_settings, path=model)
    if train is not None:  # given in Python: no row is taken from it for evaluation
        sections["dataset"] = replace(sections["dataset"], held_out=0)
    lora = peft_config is not None or model_settings.lora is not None or hasattr(model, "peft_config")
    named = None if isinstance(recipe, Algorithm) else recipe
    known = known_model(model_settings, model, trust_remote_code)
    chosen = with_router_balance(chosen, known[0])
    plan, record = _described(chosen, sections, args, lora, model, peft_config, named, known)
    _refuse(list(process_problems(args)))
    if several := isinstance(evaluation, dict):
        sections["dataset"] = replace(sections["dataset"], held_out=0)
    check_hub_names(chosen.plugins())
    _check_dataset(chosen, sections["dataset"], train, None if several else evaluation)
    ask_for_repository(args)

    tokenizer = prepare_tokenizer(
        _tokenizer_of(model, model_settings, trust_remote_code) if tokenizer is None else tokenizer, model_settings
    )
    _refuse(tag_problems(chosen, tokenizer) + token_problems(chosen, tokenizer))
    config = getattr(model, "config", None) or load_config(
        model_settings.path, model_settings.revision, trust_remote_code=trust_remote_code
    )
    if known[0] is None:  # it was not on this machine
        chosen = with_router_balance(chosen, config)
        plan, record = _described(chosen, sections, args, lora, model, peft_config, named, (config, known[1]))
    room = {"max_prompt_tokens": prompt_room(config, sections["dataset"], chosen)}
    room["tool_tokens"] = tool_tokens(chosen, tokenizer)
    parts = RunComponents(
        algorithm=chosen, sections=sections, plan=plan, record=record, model=None, tokenizer=tokenizer, room=room
    )
    longest = _read_rows(parts, train, evaluation)
    _refuse(template_problems(chosen, tokenizer, parts.train))
    plan.in_words = in_words(chosen, sections, args, model, lora, (*record["rows"].values(), longest))
    record["plan"]["in_words"] = plan.in_words
    if on_plan is not None:
        known_of = {"prompt_tokens": longest, "peft_config": peft_config, "trust_remote_code": trust_remote_code}
        on_plan(_forecast(plan, chosen, args, sections, **known_of))
    model = _model(model, model_settings, chosen, args.seed, trust_remote_code, lora)
    check_vocabulary(tokenizer, model)
    parts.model = _adapted(model, peft_config, model_settings, args.seed) if lora else model
    warn_of_ragged_epochs(record["rows"]["train"], chosen.rollout.prompts, args)
    return parts


def _forecast(
    plan: Plan, algorithm: Algorithm, args: TrainingArguments, sections: dict[str, Any], **known: Any
) -> Plan:
    """Return the plan with a memory forecast if there can be one: a run does not depend on it."""
    with suppress(Exception):
        estimate_memory(plan, algorithm, args, sections, **known)
    return plan


def _described(
    algorithm: Algorithm,
    sections: dict[str, Any],
    args: TrainingArguments,
    lora: bool,
    model: Any,
    peft_config: Any,
    recipe: Recipe | None,
    known: tuple[Any, str | None],
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan and the whole record of a run."""
    refused = _misfits(model, sections["model"], peft_config)
    plan, record = describe(algorithm, sections, args, lora, refused, recipe, known)
    record["run"] = resumable_settings(args, sections, peft_config, algorithm)
    record["name"], record["recipe"] = (None, None) if recipe is None else (recipe.name, _as_run(recipe, model, args))
    return plan, record


def _read_rows(parts: RunComponents, train: Any, evaluation: Any) -> int | None:
    """Load the prompts, and return the tokens of the longest one that is trained on, None for a stream."""
    several = evaluation if isinstance(evaluation, dict) else None
    given = {"train": train, "evaluation": None if several is not None else evaluation}
    with doing("reading the dataset"):
        parts.train, parts.evaluation = load_prompts(parts.dataset_settings, parts.tokenizer, **parts.room, **given)
    if several is not None:
        parts.evaluation = parts.as_prompts(several)
    for part in (parts.train, *(parts.evaluation.values() if several is not None else [parts.evaluation])):
        check_prompts(part, parts.algorithm, parts.sections["model"].chat_template_kwargs)
    parts.record["rows"] = {"train": _count(parts.train), "evaluation": _count(parts.evaluation)}
    found: int | None = parts.train.longest
    return found


def check_recipe(recipe: Recipe, args: TrainingArguments) -> Plan:
    """Return the plan of a recipe without loading a model. Raises `ValueError` with every reason for refusal."""
    known = known_model(recipe.model)
    algorithm = with_router_balance(recipe.algorithm(), known[0])
    hidden = tag_problems_by_name(algorithm, recipe.model)
    plan, _ = describe(algorithm, recipe.sections, args, recipe.model.lora is not None, hidden, recipe, known)
    rows = (None, None, None) if recipe.dataset.path is None else _check_dataset(algorithm, recipe.dataset)
    plan.in_words = in_words(algorithm, recipe.sections, args, None, recipe.model.lora is not None, rows)
    return plan


def _check_dataset(algorithm: Algorithm, settings: Dataset, train: Any = None, evaluation: Any = None) -> Counts:
    """Return the numbers of training and held-out rows, where they are known.

    Raises `ValueError` where a column is missing, or a named dataset has fewer rows than a rollout has prompts.
    """
    columns, rows, held_out = read_columns(settings, train, evaluation)
    check_columns(columns, [plugin for _, plugin in algorithm.plugins()])
    if train is None and rows is not None and rows < algorithm.rollout.prompts:
        raise ValueError(f"rollout.prompts={algorithm.rollout.prompts} and the dataset has {rows} rows to train on")
    _refuse(list(filter(None, [order_problem(algorithm.sampler, streamed=rows is None, shuffle=settings.shuffle)])))
    return rows, held_out, None


def _as_run(recipe: Recipe, model: Any, args: TrainingArguments) -> dict[str, Any]:
    """Return the recipe with the model and the arguments that were given in Python: the content of `recipe.yaml`."""
    raw = {**recipe.raw, "training": training_of(args, recipe.training)}
    return {**raw, "model": {**raw["model"], "path": model}} if isinstance(model, str) else raw


def _count(prompts: Any) -> int | None:
    """Return the number of prompts; None for a stream."""
    if isinstance(prompts, dict):
        counts = [_count(part) for part in prompts.values()]
        return None if None in counts else sum(filter(None, counts))
    return None if isinstance(prompts, StreamedPrompts) else len(prompts or ())


def _misfits(model: Any, settings: Model, peft_config: Any) -> Iterator[str]:
    """Yield why the `model` section does not fit what was passed in Python."""
    if model is not None and not isinstance(model, str) and is_quantised(settings):
        yield "model.load_in_4bit and load_in_8bit are for a model that is named: load it so yourself, or drop them"
    if peft_config is not None:
        yield from (f"peft_config: {problem}" for problem in config_problems(peft_config))
    if hasattr(model, "peft_config"):
        yield from (f"model: {problem}" for problem in adapted_model_problems(model))


def _adapted(model: Any, peft_config: Any, settings: Model, seed: int) -> Any:
    """Return the model with a new adapter; a model that has one keeps it."""
    if hasattr(model, "peft_config"):
        return model
    with seeded(seed, "adapter"):
        return add_adapter(model, lora_config(settings.lora) if peft_config is None else peft_config)  # type: ignore[arg-type]


def _model(model: Any, settings: Model, algorithm: Algorithm, seed: int, trust_remote_code: bool, lora: bool) -> Any:
    """Load the model if it is only named; without dropout unless the settings keep it."""
    if model is None or isinstance(model, str):
        with seeded(seed, "model"):  # a checkpoint without a head gets a new one
            model = load_model(settings, trust_remote_code, lora)
    elif not settings.dropout:
        model = disable_dropout(model)
    if "double_backward" in algorithm.needs:  # fused attention has no second derivative
        model.set_attn_implementation("eager")
    return model


def _tokenizer_of(model: Any, settings: Model, trust_remote_code: bool) -> Any:
    """Load the tokenizer that is saved with the model."""
    path = model if isinstance(model, str) or model is None else model.config.name_or_path
    if not path and settings.path is None and model is not None:
        raise ValueError(
            "the model has no name_or_path to load its tokenizer from. Pass the tokenizer as processing_class"
        )
    return load_tokenizer(replace(settings, path=path or settings.path), trust_remote_code)


def section_problems(algorithm: Algorithm, sections: dict[str, Any], lora: bool) -> list[str]:
    """Return reasons why the sections of a recipe do not fit its algorithm, with the fix. `lora`: an adapter is trained."""
    found = model_problems(sections["model"], lora, algorithm.plugins())
    if sections["evaluation"].ema and algorithm.update.ema is None:
        found.append(
            "evaluation.ema rolls out the policy's moving average and there is none: set update.ema=0.992, or drop it"
        )
    streamed, shuffle = sections["dataset"].streaming, sections["dataset"].shuffle
    found += filter(None, [order_problem(algorithm.sampler, streamed=streamed, shuffle=shuffle)])
    return found


def describe(
    algorithm: Algorithm,
    sections: dict[str, Any],
    args: TrainingArguments,
    lora: bool,
    refused: Iterable[str] = (),
    recipe: Recipe | None = None,
    known: tuple[Any, str | None] = (None, None),
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan and the record of a run. `lora`: an adapter is trained. `known`: what `known_model` returned.

    Raises `ArgumentError` for refused arguments, and `AlgorithmError` with every other reason for refusal at once, those in
    `refused` included.
    """
    check_arguments(args)
    config, dtype = known
    problems = [
        *algorithm.problems(),
        *section_problems(algorithm, sections, lora),
        *dtype_problems(dtype, lora),
        *refused,
    ]
    problems += [f"optimizer={algorithm.optimizer.name}: {why}" for why in algorithm.optimizer.check_arguments(args)]
    problems += [*offload_problems(algorithm, args), *device_problems(algorithm, args), *optimizer_problems(args)]
    problems += sharding_problems(algorithm, args, sections["model"])
    problems += router_problems(algorithm, config)
    if config is not None:
        try:
            prompt_room(config, sections["dataset"], algorithm)
        except ValueError as error:
            problems.append(str(error))
    if not lora:
        problems += [
            f"{path}={plugin.name} needs a policy with an adapter: set model.lora={{r: 16}} (--use_peft, or peft_config in "
            "Python), or choose another"
            for path, plugin in algorithm.plugins()
            if "adapter" in plugin.needs
        ]
    _refuse(problems)
    manifest = get_host().manifest([type(plugin) for _, plugin in algorithm.plugins()])
    of_run = {"lora": lora, "policy_state": policy_state(algorithm, args), "config": config, "device": args.device}
    rows = args.per_device_train_batch_size
    plan = make_plan(algorithm, manifest, processes=args.world_size, rows_per_micro_batch=rows, **of_run)
    plan.remarks += dtype_remarks(dtype, lora, args, config)
    plan.remarks += [*offload_remarks(algorithm, args), *([] if recipe is None else recipe_remarks(recipe, args))]
    record = {"algorithm": algorithm.as_dict(), "plan": plan.as_dict(), "versions": versions()}
    return plan, json.loads(json.dumps(record, default=str))  # as a checkpoint's manifest gives it back


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise AlgorithmError("this combination is refused:\n" + "\n".join(f"  - {problem}" for problem in problems))


def estimate_memory(
    plan: Plan,
    algorithm: Algorithm,
    args: TrainingArguments,
    sections: dict[str, Any],
    *,
    model: Any = None,
    peft_config: Any = None,
    prompt_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Fill the plan's memory forecast: of `model` if it is loaded, else of the one that the settings name."""
    from hf_rlhf.training.memory.estimate import estimate

    known = prompt_tokens or sections["dataset"].max_prompt_tokens
    base = getattr(model, "get_base_model", lambda: model)()
    whole = None if isinstance(model, str) or getattr(base, "is_quantized", False) else model
    own = {"model": whole, "peft_config": peft_config, "prompt_tokens": known, "trust_remote_code": trust_remote_code}
    found = estimate(sections["model"], algorithm, args, **own)
    plan.memory, plan.memory_notes = found.phases, found.notes
    if found.phases and prompt_tokens is None and any(x.tool_schemas() for x in algorithm.environment):
        plan.memory_notes.append("without the tools that prompts describe")
