"""Forecast the peak memory of a run without rollouts from shapes; see `hf_rlhf.training.memory.estimate`."""

from __future__ import annotations

import transformers

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.data.quantization import bytes_of
from hf_rlhf.training.memory import shapes
from hf_rlhf.training.memory.estimate import Estimate
from hf_rlhf.training.memory.shapes import BlueprintError, load_config, with_adapter, without_weights
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
) -> Estimate:
    """Return the phases `evaluation` and `update`, for rows of up to `tokens`; or a note that says why there are none."""
    found = Estimate()
    try:
        config = load_config(settings.path, settings.revision, trust_remote_code)
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        bound = min((x for x in (trainer.max_length, context) if x is not None), default=tokens)
        if bound is None:
            raise BlueprintError("nothing bounds a row's tokens; set trainer.max_length")
        if trainer.head != "causal":
            config.num_labels, config.get_text_config().pad_token_id = trainer.outputs, 0
        plain = without_weights(getattr(transformers, AUTO[trainer.head]), config, settings.dtype, trust_remote_code)
    except BlueprintError as error:
        return Estimate(notes=[f"not estimated: {error}"])
    if tokens is None:
        found.notes.append(
            f"rows of {bound:,} tokens are assumed, the most that trainer.max_length and the model allow"
        )
    tokens, footprint, half = tokens or bound, trainer.footprint(settings.lora is not None), bool(args.bf16)
    model = with_adapter(plain, settings, settings.lora and lora_for(settings.lora, trainer.head))
    trained, spared = shapes.tensor_bytes(model, trainable=True), bytes_of(plain, settings)
    held: shapes.Sizes = {
        "weights": shapes.tensor_bytes(model),
        "reference": footprint.reference * (shapes.tensor_bytes(model) - spared[0]),
        "optimizer": shapes.optimizer_bytes(optimizer_name(args), trained, found.notes),
        "gradient buckets": trained * (args.world_size > 1),
    }
    texts, row = args.per_device_eval_batch_size * footprint.texts, 4 * TILE[1] * (trainer.head == "causal")
    evaluation = {"forward": shapes.layer_bytes(model, half, texts * tokens) + row * min(texts * tokens, TILE[0])}
    if footprint.logits:
        head = model.get_output_embeddings().weight
        evaluation["logits"] = (texts * head.element_size() + 3 * 4) * tokens * len(head)  # a row's more than once
    found.add("evaluation", held | evaluation, spared)
    count = args.per_device_train_batch_size * footprint.texts * (bound if footprint.packed else tokens)
    batch = shapes.micro_batch_bytes(model, args, count, row * min(count, TILE[0]))
    found.add("update", held | {"gradients": trained} | batch, spared)
    return found
