"""TrainingArguments of a recipe, and the arguments that are forced, refused or without effect.

The tables in docs/training_arguments.md are made from this module.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_rlhf.config.sharding import take_sharding
from hf_rlhf.registry.discovery import source_of
from hf_rlhf.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments


FORCED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "columns other than the prompt reach the rewards"),
    "logging_nan_inf_filter": (False, "a non-finite step is skipped and counted, never smoothed over"),
    "average_tokens_across_devices": (False, "aggregation weights already span the whole optimizer step"),
}
"""Argument -> (value it is set to, why)."""

OFFLINE_REFUSED: dict[str, str] = {
    "auto_find_batch_size": "a retry would repeat the rollout or change the batches of the plan; set "
    "per_device_train_batch_size (or update.max_tokens_per_micro_batch)",
    "label_smoothing_factor": "the recipe's loss does not read it",
    "ignore_data_skip": "a resumed run continues exactly where it stopped",
    "fp16": "its loss scaler is untested here; use bf16",
    "fp16_full_eval": "evaluation uses the policy as it trains",
    "deepspeed": "ZeRO-3 empties weights outside of each module's own forward, where the head in chunks reads them; set "
    "training.fsdp=true, which shards as ZeRO-3 does (with training.fsdp_config={reshard_after_forward: false} as ZeRO-2)",
    "parallelism_config": "only data parallelism is tested here",
    "torch_compile": "compiled forward passes are untested here",
    "use_liger_kernel": "its fused losses are not the recipe's",
    "batch_eval_metrics": "held-out metrics are the recipe's own; no logits are batched",
    "include_for_metrics": "held-out metrics are the recipe's own; no logits are passed on",
    "enable_jit_checkpoint": "its checkpoint mixes the states of two moments; use save_steps",
    "debug": "the underflow tracer and TPU debugging are untested here",
}
"""Argument -> what to use instead, in recipes without rollouts. An argument is refused when it differs from its default."""
REFUSED: dict[str, str] = {
    "gradient_accumulation_steps": "it is derived: set update.mini_batches for the number of optimizer steps per rollout, "
    "per_device_train_batch_size or update.max_tokens_per_micro_batch for the size of a micro-batch",
    **OFFLINE_REFUSED,
    "neftune_noise_alpha": "with noise in the update its log-probs differ from the rollout's",
    "train_sampling_strategy": "prompts come from PromptStream; see dataset.shuffle",
    "bf16_full_eval": "evaluation uses the policy as it trains",
    "include_num_input_tokens_seen": "rollout/tokens counts the completion tokens",
}
"""The same in recipes with rollouts."""

NO_LOADER = "prompts come from PromptStream, not from a dataloader"
NO_LOGITS = "evaluation samples and scores completions; it gathers no logits"
WITHOUT_EFFECT: dict[str, str] = {
    "per_device_eval_batch_size": "evaluation decodes as many rows at a time as a rollout has; it only enters Trainer's "
    "`eval_steps_per_second`",
    "prediction_loss_only": NO_LOGITS,
    "eval_do_concat_batches": NO_LOGITS,
    "eval_use_gather_object": NO_LOGITS,
    "eval_accumulation_steps": NO_LOGITS,
    "label_names": "there are no labels",
    "dataloader_drop_last": NO_LOADER,
    "dataloader_num_workers": NO_LOADER,
    "dataloader_pin_memory": NO_LOADER,
    "dataloader_persistent_workers": NO_LOADER,
    "dataloader_prefetch_factor": NO_LOADER,
    "dataloader_multiprocessing_context": NO_LOADER,
    "dataloader_in_order": NO_LOADER,
    "length_column_name": "rows of a prompt stay together; padded rows are sorted by their own lengths",
    "accelerator_config": "its dataloader settings are not read; the rest is Accelerate's",
    "use_cache": "rollouts use the cache and updates do not",
    "liger_kernel_config": "`use_liger_kernel` is refused",
    "do_train": "as in Trainer, it is for scripts",
    "do_eval": "as in Trainer, it is for scripts",
    "do_predict": "as in Trainer, it is for scripts",
    "resume_from_checkpoint": "as in Trainer, pass it to `train()`; on the command line use `--resume` or "
    "`--resume_from_checkpoint`",
    "torch_compile_backend": "it turns `torch_compile` on, which is refused",
    "torch_compile_mode": "it turns `torch_compile` on, which is refused",
}
"""Argument -> why nothing reads it here. The plan lists those that a recipe sets."""

DEFAULTS: dict[str, Any] = {
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 64,
}
"""Defaults of a recipe's `training` that differ from those of TrainingArguments."""

DECISIVE = (
    *("seed", "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16"),
)
"""Arguments that a resumed run must share with its checkpoint."""


NOT_IN_RECIPE = ("output_dir", "logging_dir", "resume_from_checkpoint", "hub_token", "run_name", "local_rank")
"""Arguments that `recipe.yaml` does not keep."""


@functools.cache
def argument_names() -> list[str]:
    """Return the fields of TrainingArguments, read from its source: importing it imports torch."""
    if "transformers.training_args" in sys.modules:
        return [
            f.name for f in dataclasses.fields(sys.modules["transformers.training_args"].TrainingArguments) if f.init
        ]
    tree = ast.parse(source_of("transformers.training_args"))
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    annotated = (node for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
    return [
        node.target.id  # type: ignore[union-attr]
        for node in annotated
        if not {"ClassVar", "init=False"} & set(re.findall(r"ClassVar|init=False", ast.unparse(node)))
    ]


class ArgumentError(ValueError):
    """TrainingArguments that the recipe's trainer cannot honor."""


def training_keywords(
    name: str, training: Mapping[str, Any], output_dir: str, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return keywords of TrainingArguments: `own` over `training` over `DEFAULTS`, for the recipe `name`.

    Raises `UserError` for keywords that a recipe may not set.
    """
    import torch

    for key, instead in (("output_dir", "--output-dir"), ("resume_from_checkpoint", "--resume")):
        if training.get(key):
            raise UserError(f"training.{key} is not read from a recipe: pass {instead}")
    if training.get("hub_token"):
        raise UserError("training.hub_token would be written to the run's files: set HF_TOKEN, or use `hf auth login`")
    cpu = {} if torch.accelerator.is_available() else {"use_cpu": True}  # several processes then meet over gloo
    named = os.environ.get("WANDB_NAME")  # of a stage, PIPELINE/STAGE, in place of PIPELINE
    run_name = named + "".join(name.partition("/")[1:]) if named else name
    return {**DEFAULTS, **cpu, "run_name": run_name, **training, **own, "output_dir": output_dir}


def training_arguments(
    name: str, training: Mapping[str, Any], output_dir: str, own: Mapping[str, Any]
) -> TrainingArguments:
    """Return TrainingArguments from `training_keywords`. Raises `UserError` where transformers rejects them."""
    from transformers import TrainingArguments

    if training.get("deepspeed") or own.get("deepspeed"):  # transformers would look for its package first
        raise UserError(f"training.deepspeed is refused: {OFFLINE_REFUSED['deepspeed']}")
    try:
        args = TrainingArguments(**training_keywords(name, training, output_dir, own))
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {error}") from error
    args._own = dict(own)  # type: ignore[attr-defined]  # chosen by the user, so differences_from_recipe skips them
    return args


def differences_from_recipe(args: TrainingArguments, training: Mapping[str, Any]) -> list[str]:
    """Return one remark that lists where `args` differ from a recipe's `training` over `DEFAULTS`; empty where they agree.

    Arguments that were passed to `recipe.training_arguments` are not listed.
    """
    lines = []
    for name, expected in {**DEFAULTS, **training}.items():
        value = getattr(args, name, expected)
        if name == "report_to":
            expected = [] if expected in (None, "none", ["none"]) else expected
            expected = [expected] if isinstance(expected, str) else expected
        if name not in getattr(args, "_own", ()) and value != expected:
            lines.append(f"{name}={getattr(value, 'value', value)!r} (recipe: {expected!r})")
    if not lines:
        return []
    return [
        f"the TrainingArguments differ from the recipe's: {', '.join(lines)}. "
        "recipe.training_arguments(output_dir, **changes) starts from the recipe's"
    ]


def training_of(args: TrainingArguments, training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `training` of a recipe with which a run would get `args`.

    `training` is the recipe's own. Folders, tokens and arguments that YAML cannot hold are left out.
    """
    own = getattr(args, "_own", None)
    if own is None:
        defaults = {f.name: _default(f) for f in dataclasses.fields(args)}
        values = {name: getattr(args, name) for name in defaults}
        own = {name: x for name, x in values.items() if name in DEFAULTS or name in training or x != defaults[name]}
        training = {}
    own = {name: getattr(value, "value", value) for name, value in own.items() if name not in NOT_IN_RECIPE}
    return {**training, **{name: x for name, x in own.items() if isinstance(x, int | float | str | list | dict)}}


def check_arguments(args: Any, rollouts: bool = True) -> None:
    """Raise `ArgumentError` naming every refused argument and its replacement; with rollouts, set what is forced."""
    defaults = {f.name: _default(f) for f in dataclasses.fields(args)}
    refused = []
    for name, instead in (REFUSED if rollouts else OFFLINE_REFUSED).items():
        value = getattr(args, name, None)
        if value != defaults.get(name) and value not in (None, False, "no", [], ""):
            refused.append(f"training.{name}={value!r} is refused: {instead}")
    best = args.metric_for_best_model in (None, "loss", "eval_loss")
    if rollouts and args.load_best_model_at_end and best:
        refused.append(
            "training.load_best_model_at_end needs training.metric_for_best_model: evaluation has no loss; name one of its "
            "metrics, for instance accuracy or reward/total/mean"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.world_size == 1:
        refused.append(
            f"a launcher started {os.environ['WORLD_SIZE']} processes and there is no accelerator for them: set "
            "training.use_cpu (--use_cpu true), so that they work together"
        )
    if args.n_gpu > 1:
        refused.append(
            f"{args.n_gpu} GPUs in one process would use nn.DataParallel, which is refused: start one process per GPU with "
            "`accelerate launch -m hf_rlhf train ...`, or select one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    refused += take_sharding(args)
    if refused:
        raise ArgumentError("\n".join(refused))
    if not rollouts:
        return
    for name, (forced, _) in FORCED.items():
        setattr(args, name, forced)
    if args.ddp_find_unused_parameters is None:  # every parameter takes part; the search costs a traversal per step
        args.ddp_find_unused_parameters = False


def check_accelerator(accelerator: Any, args: Any) -> None:
    """Raise `ArgumentError` where a launcher asks for the same through the environment."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ArgumentError(
            f"the launcher asks for {kind}: {OFFLINE_REFUSED['deepspeed' if kind == 'DEEPSPEED' else 'parallelism_config']}"
        )
    if accelerator.mixed_precision == "fp16" or accelerator.scaler is not None:
        raise ArgumentError(f"the launcher asks for mixed precision fp16: {REFUSED['fp16']}")
    if args.gradient_accumulation_steps != 1:
        raise ArgumentError(f"accelerator_config sets gradient accumulation: {REFUSED['gradient_accumulation_steps']}")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
