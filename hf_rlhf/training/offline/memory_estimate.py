"""Forecast the peak memory of a run without rollouts from shapes; see `hf_rlhf.training.memory.estimate`."""

from __future__ import annotations

from typing import Any

import transformers

from hf_rlhf.config.sharding import sharding_of
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.data.model_loading import ModelError, without_weights
from hf_rlhf.data.quantization import bytes_of
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training.memory import estimate as memory
from hf_rlhf.training.offline.model import AUTO, lora_for
from hf_rlhf.training.offload_checks import optimizer_name

TILE = (4096, 32768)
"""Tokens and width of the logits that the head of TRL's trainers has at a time, whatever the vocabulary."""


def estimate_offline(
    settings: Model,
    trainer: OfflineTrainer,
    args: transformers.TrainingArguments,
    *,
    tokens: int | None = None,
    trust_remote_code: bool = False,
) -> memory.Estimate:
    """Return the phases `evaluation` and `update`, for rows of up to `tokens`; or a note that says why there are none."""
    adapter, half = settings.lora and lora_for(settings.lora, trainer.head), bool(args.bf16)
    footprint, auto = trainer.footprint(adapter is not None), getattr(transformers, AUTO[trainer.head])
    try:
        plain = without_weights(auto, settings, trust_remote_code, num_labels=trainer.outputs)
        bound = most_tokens(plain, trainer) or tokens
        if bound is None:
            raise ModelError("nothing bounds a row's tokens; set trainer.max_length")
        model = memory.with_adapter(plain, adapter)
    except UserError as error:
        return memory.Estimate(notes=[f"not estimated: {error}"])
    assumed = f"rows of {bound:,} tokens are assumed, the most that trainer.max_length and the model allow"
    found, tokens = memory.Estimate(notes=[assumed] if tokens is None else []), tokens or bound
    trained, spared = memory.tensor_bytes(model, trainable=True), bytes_of(plain, settings)
    sharded = sharding_of(args) is not None
    shards = args.world_size if sharded else 1
    held = {
        "weights": memory.tensor_bytes(model) / shards,
        "reference": footprint.reference * (memory.tensor_bytes(model) - spared[0]) / shards,
        "optimizer": memory.optimizer_bytes(optimizer_name(args), trained, found.notes) / shards,
        "gradient buckets": trained * (args.world_size > 1 and not sharded),
        **({"gathered weights": memory.gathered_bytes(model)} if shards > 1 else {}),
    }
    texts, row = args.per_device_eval_batch_size * footprint.texts, 4 * TILE[1] * (trainer.head == "causal")
    evaluation = {"forward": memory.layer_bytes(model, half, texts * tokens) + row * min(texts * tokens, TILE[0])}
    if footprint.logits:  # a row's more than once
        head = model.get_output_embeddings().weight
        evaluation["logits"] = (texts * head.element_size() + 3 * 4) * tokens * len(head)
    found.add("evaluation", held | evaluation, spared)
    count = args.per_device_train_batch_size * footprint.texts * (bound if footprint.packed else tokens)
    batch = memory.micro_batch_bytes(model, args, count, row * min(count, TILE[0]))
    found.add("update", held | {"gradients": trained / shards} | batch, spared)
    return found


def most_tokens(model: Any, trainer: OfflineTrainer) -> int | None:
    """Return the most tokens of a row that the trainer and the model allow; None without a bound."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((x for x in (trainer.max_length, context) if x is not None), default=None)
