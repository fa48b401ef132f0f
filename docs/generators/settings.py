"""Settings: the sections of a recipe, and every field of TrainingArguments."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

from generators.markdown import code, settings_table, table
from hf_rlhf.config.offline_sections import OfflineDataset
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.config.training_arguments import DEFAULTS, FORCED, OFFLINE_REFUSED, REFUSED, WITHOUT_EFFECT
from hf_rlhf.contract.model_settings import Lora
from hf_rlhf.registry.settings_schema import default_text, plain_text

MEANING: dict[str, str] = {
    "output_dir": "On the command line it is `--output-dir`, or `outputs/RECIPE`; one in a recipe is an error.",
    "per_device_train_batch_size": "Most rows of a micro-batch on a process, in the update and in forwards without "
    "gradient. It does not change the result. `update.max_tokens_per_micro_batch` bounds it further.",
    "max_steps": "Optimizer steps. A rollout feeds `update.mini_batches` x `update.epochs` of them.",
    "num_train_epochs": "Passes over the prompts, each of rows // `rollout.prompts` whole rollouts (at least one). The "
    "rest of the prompts is not lost: the next pass begins with it. Prompts that a resampling filter draws do not count.",
    "learning_rate": "Of the policy; of the critic too unless `critic.learning_rate` is set.",
    "lr_scheduler_type": "Its steps are optimizer steps. It scales the critic's learning rate as well.",
    "warmup_steps": "Optimizer steps in which the learning rate rises; below 1 a share of all steps. The critic's own "
    "`warmup_steps`, in which only it learns, are another thing.",
    "optim": "Used while `optimizer.use` is `trainer`; it gets the critic in parameter groups of its own.",
    "weight_decay": "Of policy and critic, by Trainer's rule which parameters decay.",
    "max_grad_norm": "Policy and critic are clipped each by its own norm. 0 turns clipping off.",
    "bf16": "Autocast, the same in rollout, forwards without gradient and update; the weights keep `model.dtype`.",
    "fsdp": "Shards policy, critic and references over the processes (FSDP2); see [hardware.md](hardware.md#sharded).",
    "fsdp_config": "`reshard_after_forward` and `activation_checkpointing`; other values are refused by name.",
    "gradient_checkpointing": "As in Trainer; for the policy. A separate critic keeps its activations.",
    "activation_checkpointing": "As in Trainer; for the policy. A separate critic keeps its activations.",
    "torch_empty_cache_steps": "Optimizer steps; the cache is emptied after each of that step's micro-batches.",
    "seed": "Of rollouts, evaluation, mini-batches and a critic's new weights; of the order of prompts without "
    "`data_seed`. A checkpoint resumes under its own seed only.",
    "data_seed": "Of the order of prompts.",
    "logging_steps": "Optimizer steps. What lies between two entries is averaged; `health/` counts are summed.",
    "report_to": "`metrics.jsonl` and `completions/` are written besides, whatever it says. `wandb` without an account "
    "logs offline. A tracker that fails is dropped with a warning.",
    "run_name": "On the command line the recipe's name when left out.",
    "eval_strategy": "Evaluation rolls out the held-out prompts as `evaluation` says. `hf-rlhf train` evaluates before "
    "and after training in any case.",
    "metric_for_best_model": "Any metric of the evaluation, for instance `accuracy` or `reward/total/mean`.",
    "load_best_model_at_end": "Loads the policy of the best checkpoint; the critic stays as it is.",
    "save_only_model": "Such a checkpoint holds no optimizer and cannot be resumed.",
    "save_total_limit": "Older checkpoints are deleted after the new one is whole.",
    "hub_token": "`hf-rlhf train` refuses it, since it would be written into the run's record: set HF_TOKEN.",
    "ddp_find_unused_parameters": "False when left out: every parameter takes part in every backward.",
    "disable_tqdm": "True on the command line, which has a display of its own.",
}
"""Honoured arguments whose meaning here needs a sentence."""

AS_IN_TRAINER = """
lr_scheduler_kwargs optim_args adam_beta1 adam_beta2 adam_epsilon optim_target_modules tf32
activation_checkpointing_kwargs gradient_checkpointing_kwargs logging_strategy logging_first_step log_on_each_node
log_level log_level_replica project trackio_space_id trackio_bucket_id trackio_static_space_id eval_steps eval_delay
eval_on_start save_strategy save_steps save_on_each_node push_to_hub hub_private_repo hub_model_id hub_strategy
hub_always_push hub_revision greater_is_better restore_callback_states_from_checkpoint full_determinism use_cpu
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout skip_memory_metrics local_rank
"""
"""Arguments that mean what Trainer's own documentation says, separated by white space."""


def sections() -> Iterator[str]:
    """Sections of a recipe."""
    for name, cls in SECTIONS.items():
        yield f"## {name}\n\n{inspect.getdoc(cls)}\n\n{settings_table(cls)}"
    yield f"### model.lora\n\n{inspect.getdoc(Lora)} Needs `hf_rlhf[peft]`.\n\n{settings_table(Lora)}"
    yield (
        "### Without rollouts\n\nA recipe with a `trainer` has `trainer`, `model`, `dataset` and `training`, and its `dataset` "
        f"is another. {inspect.getdoc(OfflineDataset)}\n\n{settings_table(OfflineDataset)}"
    )


def arguments() -> Iterator[str]:
    """Every field of TrainingArguments under honoured, forced, refused or without effect."""
    from transformers import TrainingArguments

    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    as_in_trainer = AS_IN_TRAINER.split()
    parts = [MEANING, as_in_trainer, FORCED, REFUSED, WITHOUT_EFFECT]
    placed = [name for part in parts for name in part]
    wrong = [name for name in [*fields, *placed] if placed.count(name) != 1 or name not in fields]
    if wrong:
        raise SystemExit(
            f"not in exactly one list of docs/generators/settings.py and hf_rlhf/config/training_arguments.py: {', '.join(wrong)}"
        )

    def rows(part: dict[str, str]) -> list[list[str]]:
        return [[code(name), code(default_text(fields[name])), part[name]] for name in fields if name in part]

    yield "## Honoured, with something to know\n\n" + table(["argument", "default", "here"], rows(MEANING))
    kept = ", ".join(f"`{name}` ({code(default_text(fields[name]))})" for name in fields if name in as_in_trainer)
    yield f"## Honoured as in Trainer\n\nWith their defaults: {kept}."
    forced = [[code(name), code(plain_text(value)), why] for name, (value, why) in FORCED.items()]
    yield "## Forced\n\n" + table(["argument", "set to", "why"], forced)
    yield "## Refused\n\n" + table(["argument", "default", "why, and what to do"], rows(REFUSED))
    yield "## Without effect\n\nNothing reads these here; setting one changes nothing.\n\n" + table(
        ["argument", "default", "why"], rows(WITHOUT_EFFECT)
    )
    started = [[code(name), code(plain_text(value))] for name, value in DEFAULTS.items()]
    yield (
        "## Defaults\n\n`hf-rlhf train` and `recipe.training_arguments(output_dir, **own)` start from these where "
        "TrainingArguments would choose otherwise; a recipe's `training`, flags and `own` come after them. `RLHFTrainer` "
        "without `args` uses them too. TrainingArguments that are passed to it are taken verbatim, and one remark lists "
        "where they differ from the recipe's.\n\n" + table(["argument", "default"], started)
    )
    yield (
        "More than one GPU in one process is refused, as it would mean `nn.DataParallel`: start one process per GPU. "
        "Custom `optimizers=(optimizer, scheduler)` are passed to Trainer."
    )
    yield (
        "## Recipes without rollouts\n\nA recipe with a `trainer` hands its `training` to Trainer, and everything is as there "
        "but for this. `logging_nan_inf_filter` is off. Refused, unless they have their default:\n\n"
        + table(["argument", "why, and what to do"], [[code(name), why] for name, why in OFFLINE_REFUSED.items()])
    )
