"""Forecast the peak memory of a run without rollouts from shapes; see `hf_rlhf.training.memory.estimate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.data.quantization import bytes_of
from hf_rlhf.training.memory.blueprint import BlueprintError, named_config, with_adapter, without_weights
from hf_rlhf.training.memory.estimate import Estimate, checkpoints, micro_batch_bytes
from hf_rlhf.training.memory.shapes import cast_bytes, kept_per_token, layer_input_bytes, optimizer_bytes, tensor_bytes
from hf_rlhf.training.offload_checks import optimizer_name

if TYPE_CHECKING:
    from transformers import TrainingArguments

TILE = (4096, 32768)
"""Tokens and width of the logits that the head of TRL's trainers has at a time, whatever the vocabulary."""


def estimate_offline(
    settings: Model,
    trainer: OfflineTrainer,
    args: TrainingArguments,
    *,
    tokens: int | None = None,
    trust_remote_code: bool = False,
) -> Estimate:
    """Return the phases `evaluation` and `update`, or a note that says why there are none.

    `tokens`: of the longest row; as many as are allowed if left out.
    """
    found = Estimate()
    try:
        config = named_config(settings, trust_remote_code)
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        bound = min((x for x in (trainer.max_length, context) if x is not None), default=None)
        if tokens is None:
            if bound is None:
                raise BlueprintError("nothing bounds a row's tokens; set trainer.max_length")
            tokens = bound
            found.notes.append(
                f"rows of {tokens:,} tokens are assumed, the most that trainer.max_length and the model allow"
            )
        plain = _blueprint(settings, trainer, config, trust_remote_code)
    except BlueprintError as error:
        return Estimate(notes=[f"not estimated: {error}"])
    footprint, spared = trainer.footprint(settings.lora is not None), bytes_of(plain, settings)
    model = with_adapter(plain, settings, _peft(settings, trainer))
    trained, causal = tensor_bytes(model, trainable=True), trainer.head == "causal"
    held: dict[str, float] = {"weights": tensor_bytes(model)}
    if footprint.reference:
        held["reference"] = tensor_bytes(model) - spared[0]
    held["optimizer"] = optimizer_bytes(optimizer_name(args), trained, found.notes)
    if args.world_size > 1:
        held["gradient buckets"] = trained
    kept, layers = kept_per_token(model, bool(args.bf16)), config.get_text_config().num_hidden_layers

    def forward(count: int) -> float:
        return count * kept / layers + (4 * min(count, TILE[0]) * TILE[1] if causal else 0)

    texts = args.per_device_eval_batch_size * footprint.texts
    evaluation = held | {"forward": forward(texts * tokens)}
    if footprint.logits:
        head = model.get_output_embeddings().weight
        evaluation["logits"] = (texts * head.element_size() + 3 * 4) * tokens * len(head)  # a row's more than once
    found.add("evaluation", evaluation, spared)
    length = bound if footprint.packed and bound is not None else tokens
    count = args.per_device_train_batch_size * footprint.texts * length
    activations = count * (layer_input_bytes(model) if checkpoints(args) else kept)
    update = micro_batch_bytes(trained, activations, args.gradient_accumulation_steps > 1)
    update |= {"weights in 16 bits": cast_bytes(model, bool(args.bf16)), "backward": forward(count)}
    found.add("update", held | update, spared)
    return found


def _blueprint(settings: Model, trainer: OfflineTrainer, config: Any, trust_remote_code: bool) -> Any:
    """Return the model with its head, on `meta`."""
    import transformers

    from hf_rlhf.training.offline.model import AUTO

    if trainer.head != "causal":
        config.num_labels = trainer.outputs
        config.get_text_config().pad_token_id = 0
    return without_weights(getattr(transformers, AUTO[trainer.head]), config, settings, trust_remote_code)


def _peft(settings: Model, trainer: OfflineTrainer) -> Any:
    """Return the adapter's configuration for the trainer's head, if there is an adapter."""
    from hf_rlhf.training.offline.model import lora_for

    return None if settings.lora is None else lora_for(settings.lora, trainer.head)
