"""The plan: what an algorithm loads, computes and skips, and the arithmetic of its batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import Plugin, TrainedCritic
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.launcher import lone_process
from hf_rlhf.config.plan_in_words import memory_in_words
from hf_rlhf.config.recipe import Recipe
from hf_rlhf.config.references import base_label, top_k_of
from hf_rlhf.config.schedule import crossing, schedule
from hf_rlhf.config.training_arguments import WITHOUT_EFFECT, differences_from_recipe
from hf_rlhf.registry.host import get_host
from hf_rlhf.registry.settings_schema import at_path

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """Lines of text by topic; `as_dict` is kept in a run's record."""

    plugins: list[dict[str, Any]]
    models: list[str] = field(default_factory=list)
    forwards: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    arithmetic: list[tuple[str, str, str]] = field(default_factory=list)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    """Phase -> part -> estimated MiB of one process (`hf_rlhf.training.memory.estimate`); empty without a forecast."""
    memory_notes: list[str] = field(default_factory=list)
    in_words: dict[str, str] = field(default_factory=dict)
    """model, data, algorithm and batch, each in a line of words (`hf_rlhf.config.plan_in_words`)."""

    @property
    def lines(self) -> dict[str, str]:
        """The plan in five lines: `in_words` and the memory."""
        return self.in_words | {"memory": memory_in_words(self.memory, self.memory_notes)}

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists and dicts, for JSON."""
        return asdict(self)


def make_plan(
    algorithm: Algorithm,
    manifest: list[dict[str, Any]],
    *,
    processes: int = 1,
    rows_per_micro_batch: int | None = None,
    lora: bool = False,
    policy_state: bool = True,
    config: Any = None,
    device: torch.device | None = None,
) -> Plan:
    """Return the plan of `algorithm` on `processes` processes.

    `manifest` lists each plugin with its package; `policy_state`: the optimizer keeps state of the policy's parameters;
    `config`: the policy's configuration, `device`: its device, if they are known.
    """
    plan = Plan(plugins=manifest)
    _models(plan, algorithm, lora, policy_state)
    _forwards(plan, algorithm)
    plan.forwards += schedule(algorithm, device) if device is not None else []
    plan.remarks += _second_model(algorithm) if lora else []
    if not algorithm.rewards:
        learned = ", ".join(f"kl.{title}" for title, kl in algorithm.titled("kl") if kl.places)
        plan.skipped.append("rewards: the recipe has none; their metrics and columns are left out")
        plan.remarks.append(
            f"without rewards the policy moves by {learned} towards the reference alone: one that is the policy itself at the "
            "start gives a gradient of 0 there"
        )
    plan.remarks += [*lone_process(processes), *plugin_remarks(algorithm)]
    if config is not None:
        plan.remarks += plugin_remarks(algorithm, lambda plugin: plugin.model_remarks(config))
    plan.arithmetic = arithmetic(algorithm, processes, rows_per_micro_batch)
    return plan


def plugin_remarks(algorithm: Algorithm, made: Callable[[Plugin], Iterable[str]] | None = None) -> list[str]:
    """Return the remarks of all plugins, each after its path and name; by default those that `remarks` yields."""
    return [
        f"{path}={plugin.name}: {at_path(path, plugin, remark)}"
        for path, plugin in algorithm.plugins()
        for remark in (made(plugin) if made else plugin.remarks(algorithm))
    ]


def recipe_remarks(recipe: Recipe, args: TrainingArguments) -> list[str]:
    """Return remarks on a recipe's overrides and arguments; log where `args` differ from the recipe's."""
    idle = [
        f"training.{name} has no effect here: {WITHOUT_EFFECT[name]}"
        for name in recipe.training
        if name in WITHOUT_EFFECT
    ]
    differing = differences_from_recipe(args, recipe.training)
    for remark in differing if args.process_index == 0 else ():
        logger.warning(remark)
    return [*idle, *recipe.notes, *differing]


def memory_rows(plan: Plan) -> list[str]:
    """Return a line for each phase: its estimated peak and the parts of it."""
    rows = []
    for phase, parts in plan.memory.items():
        named = ", ".join(f"{part} {size:,.0f}" for part, size in parts.items() if size >= 0.5)
        rows.append(f"{phase}: {sum(parts.values()):,.0f} = {named}")
    return rows + plan.memory_notes


def _second_model(a: Algorithm) -> list[str]:
    """Return a remark on a critic that is trained whole although the policy trains an adapter."""
    if not isinstance(a.critic, TrainedCritic) or a.critic.shares_forward or "adapter" in a.critic.needs:
        return []
    return [
        f"critic={a.critic.name}: trains a whole second model; critic.adapter=true trains a second adapter on the policy's "
        "base, and critic.use=value_head a head alone"
    ]


def _models(plan: Plan, a: Algorithm, lora: bool, policy_state: bool) -> None:
    kept = ["its optimizer state"] * policy_state + ["its average"] * (a.update.ema is not None)
    away = " and ".join(kept) if a.update.offload else ""
    state = f"; offloaded while completions are sampled and scored: {away}" if away else ""
    plan.models.append("policy: " + ("its adapter is trained, its base is frozen" if lora else "trained") + state)
    shown: set[str] = set()
    for key, use in a.references.items():
        kls = [
            f"kl.{kl.label or kl.name} ({kl.estimator.name}, {kl.level})"
            for title, kl in a.titled("kl")
            if title in use.readers
        ]
        base, label = use.reference.base, base_label(a, use.reference)
        moves = ", it moves and is saved with every checkpoint" if base.moves else ""
        shared = f", with the model of {label}" if label in shown else ""
        readers = ", ".join(kls or [path for path, plugin in a.plugins() if "ref_logps" in plugin.needs])
        plan.models.append(f"{_path(key)}={use.reference.name}{shared}{_offloaded(base)}{moves}: read by {readers}")
        shown.add(label)
    if not a.references:
        plan.skipped.append("reference model: no KL is measured")
    if isinstance(a.critic, TrainedCritic):
        plan.models.append(
            f"critic={a.critic.name}{_offloaded(a.critic)}: advantages={a.advantages.name} reads its values"
        )
    else:
        plan.skipped.append(f"critic: advantages={a.advantages.name} reads no values")
    for label, source in zip(a.labels(), a.rewards, strict=True):
        if "reward_model" in source.provides:
            plan.models.append(f"reward model {label}{_offloaded(source)}: scores the completions")


def _path(key: str) -> str:
    """Return the path in a recipe of the reference with this key."""
    return f"kl.{key}.reference" if key else "reference"


def _reference_forwards(a: Algorithm, rows: int) -> Iterator[str]:
    """Yield the forwards of the references."""
    for key, use in a.references.items():
        who = f"{_path(key)} over" if key else "reference over"
        if use.in_rollout:
            top = f", and its top {use.top_k} tokens" if use.top_k else ""
            late = ", after the rewards, whose scores its prompts need" if "scores" in use.reference.needs else ""
            yield f"{who} {rows} rows, without gradient{top}{late}"
    for key, use in a.references.items():
        whole = [f"kl.{title}" for title, kl in use.update if top_k_of(kl) is None]
        if whole:
            who = f"{_path(key)} over" if key else "reference over"
            yield f"{who} {rows * a.update.epochs} rows in the update: whole distributions for {', '.join(whole)}"


def _offloaded(plugin: Any) -> str:
    return ", offloaded but for its phases" if getattr(plugin, "offload", False) else ""


def _forwards(plan: Plan, a: Algorithm) -> None:
    rows = a.rollout.prompts * a.rollout.num_generations * a.agents
    forward = bool(a.readers_of_old_logps) and not a.samples_old_logps
    if a.samples_old_logps:
        rounded = f" (in half precision or under autocast they take a forward over {rows} rows)"
        plan.skipped.append(
            f"old log-probs: rollout={a.rollout.name} notes them while sampling, for {'; '.join(a.readers_of_old_logps)}"
            f"{rounded if a.update.old_logps == 'auto' else ''}"
        )
    elif forward:
        plan.forwards.append(
            f"policy over {rows} rows, without gradient: old log-probs for {'; '.join(a.readers_of_old_logps)}"
        )
    elif "old_logps" in a.policy_loss.needs:
        later = f"; rollout_correction={a.rollout_correction.name} is taken there" if a.corrects_in_loss else ""
        plan.skipped.append(
            f"old log-probs: one optimizer step per rollout, so the update's own are the policy's{later}"
        )
    else:
        plan.skipped.append(f"old log-probs: policy_loss={a.policy_loss.name} does not read them")
    plan.forwards += _reference_forwards(a, rows)
    more = {
        "sum_sq_probs": "squared probabilities",
        "old_entropy": "entropy",
        "routing_fractions": "the experts of each token",
    }
    if (read := [what for name, what in more.items() if name in a.needs]) and not forward:
        plan.forwards.append(f"policy over {rows} rows, without gradient: {', '.join(read)}")
    if "greedy" in a.needs:
        plan.forwards.append(f"greedy completions of {a.rollout.prompts} prompts, and their rewards")
    if isinstance(a.critic, TrainedCritic):
        shared = a.critic.shares_forward
        what = f"values for advantages={a.advantages.name}"
        if shared and forward:
            plan.skipped.append(f"a forward of the critic: critic={a.critic.name} shares the policy's, {what}")
        else:
            plan.forwards.append(f"{'policy' if shared else 'critic'} over {rows} rows, without gradient: {what}")
    plan.forwards.append(f"policy over {rows * a.update.epochs} rows, with gradient ({a.update.epochs} per row)")
    if "entropy" not in a.needs:
        plan.skipped.append(
            "exact entropy: no plugin asks for it (policy/entropy is estimated from the sampled tokens, unless "
            "logging.entropy is exact)"
        )
    if a.loss_is_fused:
        plan.skipped.append(
            "logits a second time in the backward: the loss is token_level and is differentiated on the tiles of the "
            "language-model head (update.fused_loss)"
        )
    if a.skips_rows_without_advantage:
        plan.skipped.append("rows whose advantages are all 0, in the update: they would change nothing")


def arithmetic(a: Algorithm, processes: int, rows_per_micro_batch: int | None) -> list[tuple[str, str, str]]:
    """Return (quantity, value, other libraries' name) from prompts to micro-batches. Raises ValueError for too few prompts."""
    prompts, group, steps = a.rollout.prompts, a.rollout.num_generations, a.update.mini_batches
    if prompts < processes:
        raise ValueError(
            f"rollout.prompts={prompts} is less than the {processes} processes: a group stays on one process, so set "
            f"rollout.prompts to {processes} or more, or start fewer processes"
        )
    packed = a.update.max_tokens_per_micro_batch and a.update.attention != "padded"
    rows = None if packed else rows_per_micro_batch
    bound = [f"{rows} rows (training.per_device_train_batch_size)"] if rows else []
    if a.update.max_tokens_per_micro_batch:
        bound.append(f"{a.update.max_tokens_per_micro_batch} tokens (update.max_tokens_per_micro_batch)")
    return [
        ("rollout.prompts", str(prompts), "verl train_batch_size; TRL generation_batch_size / num_generations"),
        ("rollout.num_generations", str(group), "verl rollout.n; TRL num_generations"),
        ("rows per rollout", str(prompts * group), "TRL generation_batch_size"),
        *([("rows of an episode", f"up to {a.agents}", "one for each agent")] if a.agents > 1 else []),
        ("processes", str(processes), "data-parallel size"),
        ("rows per process", f"about {prompts * group / processes:g}", "a group stays on one process"),
        *([("rows of other processes", crossing(a, processes), "")] if processes > 1 else []),
        ("update.mini_batches", str(steps), "verl train_batch_size / ppo_mini_batch_size; TRL steps_per_generation"),
        ("rows per optimizer step", str(prompts * group // steps), "verl ppo_mini_batch_size x rollout.n"),
        ("update.epochs", str(a.update.epochs), "verl ppo_epochs; TRL num_iterations"),
        ("optimizer steps per rollout", str(a.steps_per_rollout), "mini_batches x epochs"),
        ("micro-batch", " and ".join(["at most " + b for b in bound]) or "unbounded", "derived; gradient accumulation"),
    ]


def plugin_files(plan: Mapping[str, Any]) -> list[str]:
    """Return the files that plugins of a plan, as `Plan.as_dict` gives it, were taken from (`-p FILE.py`)."""
    modules = {row["module"] for row in plan["plugins"]}
    return list(dict.fromkeys(str(x.file) for x in get_host().offers() if x.file and x.module in modules))
