"""The plan in five lines: model, data, algorithm in words, arithmetic of the batches, memory.

The words for an algorithm come from its plugins (`Plugin.in_words`): a combination that nobody has named reads as well as GRPO.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import Environment, KLPlacement, Plugin, TrainedCritic
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.sharding import sharding_of
from hf_rlhf.contract.model_settings import Model

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_rlhf.contract.offline_trainer import OfflineTrainer

PLACES = {"reward": "in the reward", "advantage": "in the advantages", "loss": "in the loss"}
GIB = 1024.0
"""MiB."""

Counts = tuple[int | None, int | None, int | None]
"""Training rows, held-out rows, tokens of the longest prompt; None where unknown."""


def in_words(
    a: Algorithm, sections: dict[str, Any], args: TrainingArguments, model: Any, adapter: bool, rows: Counts
) -> dict[str, str]:
    """Return the lines of a plan but the memory. `model`: one that was given in Python; `adapter`: one is trained."""
    given = model if isinstance(model, str) else None
    if model is not None and given is None:
        given = getattr(model.config, "name_or_path", None) or type(model).__name__
    return {
        "model": model_in_words(a, sections["model"], given, adapter),
        "data": data_in_words(sections["dataset"].path, "prompts", *rows),
        "algorithm": algorithm_in_words(a),
        "batch": batch_in_words(a, args, rows[0]),
    }


def algorithm_in_words(a: Algorithm) -> str:
    """Return what the policy learns from, from rewards to the optimizer's step."""
    return "; ".join(_algorithm(a))


def _algorithm(a: Algorithm) -> Iterator[str]:
    named = [
        label if source.weight == 1 else f"{source.weight:g} x {label}"
        for label, source in zip(a.labels(), a.rewards, strict=True)
    ]
    if a.sampler.name != a.sampler.axis.default:
        yield f"prompts: {a.sampler.in_words()}"
    yield from (_environment(environment) for environment in a.environment)
    yield f"reward {' + '.join(named)}" if named else "no reward"
    yield f"advantage: {a.advantages.in_words()}"
    yield f"loss: {a.policy_loss.in_words()}, {a.aggregation.in_words()}"
    if a.rollout_correction.needs:
        yield a.rollout_correction.in_words()
    yield from (_kl(kl) for kl in a.kl)
    yield from (f"+ {term.in_words()}" for term in a.loss_terms)
    yield from (chosen.in_words() + _redrawn(chosen.resample) for chosen in a.filters)
    if isinstance(a.critic, TrainedCritic) and a.critic.warmup_steps:
        yield f"only the critic learns in the first {a.critic.warmup_steps} steps"
    if a.optimizer.words:
        yield a.optimizer.in_words()


def _environment(environment: Environment) -> str:
    rows = f" of rows with {environment.when}" if environment.when else ""
    bounds = f"at most {_count(environment.max_turns, 'turn')} and {_count(environment.max_tokens, 'token')}"
    rendered = (
        "; each turn whose earlier turns the chat template rewrites is read whole again, here and in every forward: up to "
        f"{_count(environment.max_turns - 1, 'fork')}"
    )
    return f"episodes{rows}: {environment.in_words()} ({bounds}{rendered * (environment.history == 'as_rendered')})"


def _redrawn(rounds: int) -> str:
    return f" and replaced, up to {rounds} times" if rounds else ""


def _kl(kl: KLPlacement) -> str:
    where = " and ".join(PLACES[place] for place in PLACES if place in kl.places) or "only measured"
    facts = [
        kl.estimator.in_words() if kl.estimator.words else kl.estimator.name,
        *(["per completion"] if kl.level == "sequence" else []),
    ]
    if kl.places and hasattr(kl, "beta"):
        facts.insert(0, f"beta {kl.beta:g}")
    if kl.clamp is not None:
        facts.append(f"at most {kl.clamp:g}")
    if kl.when:
        facts.append("on rows with " + " and ".join(f"{name} {value}" for name, value in kl.when.items()))
    facts += [plugin.in_words() for name, plugin in _unusual(kl) if name not in ("estimator", "reference")]
    other = "the reference" if kl.reference is None else kl.reference.in_words()
    return f"KL to {other} {where} ({', '.join(facts)})"


def _unusual(plugin: Plugin) -> Iterator[tuple[str, Plugin]]:
    """Yield nested plugins, by setting, that are not those of the setting's default."""
    for setting in fields(plugin):
        value = getattr(plugin, setting.name)
        if isinstance(value, Plugin) and value.name != setting.metadata.get("use"):
            yield setting.name, value


def model_in_words(a: Algorithm, settings: Model, name: str | None, adapter: bool) -> str:
    """Return the policy, and the models beside it. `name`: of a model that was given, not named."""
    parts = [_trained(settings, name, adapter)]
    if "ref_logps" in a.needs:
        parts.append(f"reference: {a.reference.in_words()}")
    parts += [f"reference of kl.{key}: {use.reference.in_words()}" for key, use in a.references.items() if key]
    if isinstance(a.critic, TrainedCritic):
        parts.append(f"critic: {a.critic.in_words()}")
    for label, source in zip(a.labels(), a.rewards, strict=True):
        if "reward_model" in source.provides:
            parts.append(f"reward model: {getattr(source, 'model', label)}")
    if settings.dropout or (settings.lora and settings.lora.dropout):
        parts.append("equal completions pass one by one, since dropout draws for each")
    return "; ".join(parts)


def _trained(settings: Model, name: str | None, adapter: bool) -> str:
    title = settings.path or name or "not named yet: --model"
    bits = " in 4 bits" if settings.load_in_4bit else " in 8 bits" if settings.load_in_8bit else ""
    rank = f" of rank {settings.lora.r}" if settings.lora else ""
    return f"{title}{bits} ({f'an adapter{rank} is trained' if adapter else 'all weights are trained'})"


def offline_model_in_words(trainer: OfflineTrainer, settings: Model) -> str:
    """Return the model that a recipe without rollouts trains."""
    trained = _trained(settings, None, settings.lora is not None)
    if trainer.head == "causal":
        return trained
    outputs = f"{trainer.outputs} output{'s' if trainer.outputs > 1 else ''}"
    return f"{trained} as a {trainer.head} classifier with {outputs}"


def data_in_words(
    path: str | None, unit: str, rows: int | None, held_out: int | None, longest: int | None = None
) -> str:
    """Return the dataset with what is known of it; `unit`: what its rows are."""
    title = path or ("given in Python" if rows is not None else "not named yet: --dataset")
    known = [] if rows is None else [f"{rows:,} {unit}" + (f" of up to {longest:,} tokens" if longest else "")]
    known += [f"{held_out:,} held out" if held_out else "none held out"] if held_out is not None else []
    return ": ".join([title, ", ".join(known)] if known else [title])


def batch_in_words(a: Algorithm, args: TrainingArguments, rows: int | None) -> str:
    """Return the arithmetic from prompts to optimizer steps. `rows`: of the dataset, if it is known."""
    prompts, group, update = a.rollout.prompts, a.rollout.num_generations, a.update
    longest = getattr(a.rollout, "max_new_tokens", None)
    length = f" of up to {longest:,} tokens" if longest else ""
    parts = [f"{prompts} prompts x {_count(group, 'completion')}{length} = {prompts * group:,} per rollout"]
    if a.agents > 1:
        parts.append(f"each of up to {a.agents} agents = {prompts * group * a.agents:,} rows")
    if a.steps_per_rollout == 1:
        parts.append("1 optimizer step each")
    else:
        mini = f"{_count(update.mini_batches, 'mini-batch', 'es')} x {_count(update.epochs, 'epoch')}"
        size = prompts * group // update.mini_batches
        parts.append(f"{mini} = {a.steps_per_rollout} optimizer steps of {size:,}")
    per_epoch = None if rows is None else max(1, rows // prompts) * a.steps_per_rollout
    most = args.per_device_train_batch_size
    if most < prompts * group // update.mini_batches:
        parts.append(f"micro-batches of at most {most}")
    return "; ".join([*parts, *_processes(args), _steps(args, per_epoch)])


def offline_batch_in_words(args: TrainingArguments, packed: bool, sequences: int | None) -> str:
    """Return the arithmetic from rows to optimizer steps. `sequences`: rows, or what they are packed into, if known."""
    size, micro, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    factors = [_count(size, "packed sequence" if packed else "row")]
    factors += [f"{micro} micro-batches"] * (micro > 1) + [f"{processes} processes"] * (processes > 1)
    total = size * micro * processes
    step = " x ".join(factors) + (f" = {total:,}" if len(factors) > 1 else "") + " per optimizer step"
    return f"{step}; {_steps(args, None if sequences is None else math.ceil(sequences / total))}"


def _steps(args: TrainingArguments, per_epoch: int | None) -> str:
    if args.max_steps > 0:
        return f"{_count(args.max_steps, 'step')} in all"
    epochs = f"{args.num_train_epochs:g} epoch{'' if args.num_train_epochs == 1 else 's'} of the dataset"
    return epochs if per_epoch is None else f"{epochs} = {math.ceil(per_epoch * args.num_train_epochs):,} steps"


def _processes(args: TrainingArguments) -> list[str]:
    shared = ", each with a part of the weights" if sharding_of(args) is not None else ""
    return [f"over {args.world_size} processes{shared}"] if args.world_size > 1 else []


def _count(number: int, unit: str, plural: str = "s") -> str:
    return f"{number:,} {unit}{'' if number == 1 else plural}"


def memory_in_words(memory: dict[str, dict[str, float]], notes: list[str]) -> str:
    """Return the largest forecast peak of a process with its phase, and what it assumes; `memory` as in a plan."""
    if not memory:
        return next(iter(notes), "not estimated")
    peaks = {phase: sum(parts.values()) for phase, parts in memory.items()}
    phase = max(peaks, key=lambda name: peaks[name])
    size = f"{peaks[phase]:,.0f} MiB" if peaks[phase] < 10 * GIB else f"{peaks[phase] / GIB:,.0f} GiB"
    return "; ".join([f"about {size} per process at the peak, in the {phase}", *(x.partition(":")[0] for x in notes)])
