"""Load a model with the head that an offline trainer needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.contract.model_settings import Lora, Model
from hf_rlhf.contract.offline_trainer import Head, OfflineTrainer
from hf_rlhf.data.adapters import add_adapter
from hf_rlhf.data.model_loading import ModelError, disable_dropout, load_config, lora_config, model_path
from hf_rlhf.data.quantization import quantisation, ready
from hf_rlhf.modeling.policy import pad_token_id
from hf_rlhf.runtime.seeding import seeded

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO: dict[Head, str] = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "causal": "AutoModelForCausalLM",
}
TASKS: dict[Head, str] = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "causal": "CAUSAL_LM"}
"""Task types of peft, which trains a classifier's head whole beside the adapter."""


def context_of(settings: Model, trust_remote_code: bool) -> int | None:
    """Return the context length of the model, from its configuration alone."""
    config = load_config(settings.path, settings.revision, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_with_head(
    settings: Model, trainer: OfflineTrainer, tokenizer: PreTrainedTokenizerBase, seed: int, trust_remote_code: bool
) -> PreTrainedModel:
    """Load the model, without dropout unless the settings keep it, with an adapter where they have one.

    A head that the folder does not contain is new and depends only on the seed. Raises `ModelError` where other weights are
    missing, or the head has another number of outputs.
    """
    path = model_path(settings.path, revision=settings.revision)
    if (Path(path) / "adapter_config.json").is_file():
        raise ModelError(f"{path} contains only an adapter: merge it into its base and name the merged model")
    with seeded(seed, "model"):
        model = _load(path, settings, trainer, trust_remote_code)
        model.config.get_text_config().pad_token_id = pad_token_id(tokenizer, model)
        if not settings.dropout:
            disable_dropout(model)
        return model if settings.lora is None else _adapted(model, settings, trainer.head)


def _load(path: str, settings: Model, trainer: OfflineTrainer, trust_remote_code: bool) -> Any:
    import transformers

    loader = getattr(transformers, AUTO[trainer.head])
    options: dict[str, Any] = {} if trainer.head == "causal" else {"num_labels": trainer.outputs}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would report a new head; other missing weights are checked below
    try:
        model, loading = loader.from_pretrained(
            path,
            revision=settings.revision,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
            **quantisation(settings, path, trust_remote_code),
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{path} cannot be loaded as a {trainer.head} model with {trainer.outputs} output(s), which "
            f"trainer={trainer.name} trains: {error}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    try:
        model = ready(model, settings, settings.lora is not None, merges=settings.save_merged is not False)
    except ValueError as error:
        raise ModelError(str(error)) from error
    trunk = f"{model.base_model_prefix}."
    missing = sorted(name for name in loading["missing_keys"] if trainer.head == "causal" or name.startswith(trunk))
    if missing:
        raise ModelError(f"{path} has no weights for {', '.join(missing[:6])}; it does not contain the whole model")
    return model


def _adapted(model: Any, settings: Model, head: Head) -> Any:
    assert settings.lora is not None
    config = lora_for(settings.lora, head)
    return add_adapter(model, config)


def lora_for(settings: Lora, head: Head) -> LoraConfig:
    """Return peft's configuration for a model with this head; a classifier's head is trained whole."""
    config = lora_config(settings)
    config.task_type = TASKS[head]
    if head == "token" and config.target_modules == "all-linear":  # peft knows only the head of a sequence classifier
        config.exclude_modules = ["score", "classifier"]
    return config
