"""Which TrainingArguments are honoured, forced or refused, and why. The table in docs/training_arguments.md is made from this."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

FORCED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "columns that are not the prompt reach the rewards"),
    "logging_nan_inf_filter": (False, "a step that is not finite is skipped and counted, never smoothed over"),
    "average_tokens_across_devices": (False, "aggregation weights already span the whole optimizer step"),
}
"""Argument -> (value it is set to, why)."""

REFUSED: dict[str, str] = {
    "gradient_accumulation_steps": "it is derived: set update.mini_batches for the number of optimizer steps per rollout, "
    "per_device_train_batch_size or update.max_tokens_per_micro_batch for the size of a micro-batch",
    "auto_find_batch_size": "a retry would roll out again; set per_device_train_batch_size or "
    "update.max_tokens_per_micro_batch",
    "label_smoothing_factor": "there are no labels; a policy loss has its own settings",
    "neftune_noise_alpha": "noise in the update makes its log-probs other than the rollout's",
    "ignore_data_skip": "a resumed run goes on exactly where it was",
    "train_sampling_strategy": "prompts come from PromptStream; see dataset.shuffle",
    "fp16": "its loss scaler is untested here; use bf16",
    "fp16_full_eval": "evaluation rolls out with the policy as it trains",
    "bf16_full_eval": "evaluation rolls out with the policy as it trains",
    "fsdp": "sharded training is untested here; use one process per device (DistributedDataParallel)",
    "deepspeed": "sharded training is untested here; use one process per device (DistributedDataParallel)",
    "parallelism_config": "only data parallelism is tested here",
    "torch_compile": "compiled forwards are untested here",
    "use_liger_kernel": "its fused losses are not the recipe's",
    "include_num_input_tokens_seen": "rollout/tokens counts the completion tokens",
    "batch_eval_metrics": "evaluation rolls out and scores; it has no logits to batch",
    "include_for_metrics": "evaluation rolls out and scores; it has no logits to pass on",
    "enable_jit_checkpoint": "its checkpoint mixes the states of two moments; use save_steps",
    "debug": "the underflow tracer and TPU debugging are untested here",
}
"""Argument -> what to do instead. Refused when it differs from its default."""

NO_LOADER = "prompts come from PromptStream, not from a dataloader"
NO_LOGITS = "evaluation rolls out and scores; it gathers no logits"
WITHOUT_EFFECT: dict[str, str] = {
    "per_device_eval_batch_size": "evaluation decodes as many rows at a time as a rollout has; it enters Trainer's "
    "`eval_steps_per_second` only",
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
    "length_column_name": "rows of a prompt stay together, padded rows are sorted by their own lengths",
    "accelerator_config": "what it says of dataloaders; the rest is Accelerate's",
    "use_cache": "rollouts use the cache and updates do not",
    "fsdp_config": "`fsdp` is refused",
    "liger_kernel_config": "`use_liger_kernel` is refused",
    "do_train": "as in Trainer: it is for scripts",
    "do_eval": "as in Trainer: it is for scripts",
    "do_predict": "as in Trainer: it is for scripts",
    "resume_from_checkpoint": "as in Trainer: pass it to `train()`; on the command line `--resume` or "
    "`--resume_from_checkpoint`",
    "torch_compile_backend": "it turns `torch_compile` on, which is refused",
    "torch_compile_mode": "it turns `torch_compile` on, which is refused",
}
"""Argument -> why nothing reads it here. The plan names those that a recipe sets."""

DEFAULTS: dict[str, Any] = {
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 64,
}
"""What a recipe's `training` starts from on the command line, where TrainingArguments would choose otherwise."""


DECISIVE = (
    *("seed", "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16"),
)
"""Arguments that a resumed run must share with its checkpoint."""


class ArgumentError(ValueError):
    """TrainingArguments that reinforcement learning here cannot honour."""


def check_arguments(args: Any) -> None:
    """Sets what is forced; raises `ArgumentError` naming every refused argument and what to use instead."""
    defaults = {f.name: _default(f) for f in dataclasses.fields(args)}
    refused = []
    for name, instead in REFUSED.items():
        value = getattr(args, name, None)
        if value != defaults.get(name) and value not in (None, False, "no", [], ""):
            refused.append(f"training.{name}={value!r} is refused: {instead}")
    if args.load_best_model_at_end and args.metric_for_best_model in (None, "loss", "eval_loss"):
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
            "`accelerate launch -m hf_rlhf train ...`, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if refused:
        raise ArgumentError("\n".join(refused))
    for name, (value, _) in FORCED.items():
        setattr(args, name, value)
    if args.ddp_find_unused_parameters is None:  # every parameter takes part; the search costs a traversal per step
        args.ddp_find_unused_parameters = False


def check_accelerator(accelerator: Any, args: Any) -> None:
    """The same refusals for what a launcher asks for through the environment. Raises `ArgumentError`."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ArgumentError(f"the launcher asks for {kind}: {REFUSED['fsdp']}")
    if accelerator.mixed_precision == "fp16" or accelerator.scaler is not None:
        raise ArgumentError(f"the launcher asks for mixed precision fp16: {REFUSED['fp16']}")
    if args.gradient_accumulation_steps != 1:
        raise ArgumentError(f"accelerator_config sets gradient accumulation: {REFUSED['gradient_accumulation_steps']}")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
