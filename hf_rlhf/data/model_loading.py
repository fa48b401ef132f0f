"""Load the policy and its tokenizer as recipes name them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.contract.model_settings import Lora, Model
from hf_rlhf.data.addition_task import BUILTIN, addition_model
from hf_rlhf.data.quantization import quantisation, ready
from hf_rlhf.runtime.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelError(UserError, ValueError):
    """A model or tokenizer that cannot be used; the message says why and how to fix it."""


def load_tokenizer(settings: Model, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer, ready for rollouts (see `prepare_tokenizer`), with `chat_template` if it is set."""
    from transformers import AutoTokenizer

    path = model_path(settings.tokenizer or settings.path)
    revision = settings.revision if settings.tokenizer is None else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} has no tokenizer: set model.tokenizer ({error})") from error
    if settings.chat_template is not None:
        tokenizer.chat_template = _template(settings.chat_template)
    return prepare_tokenizer(tokenizer)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Set padding to the left, as generation requires, with the end-of-sequence token if there is no padding token.

    The vocabulary keeps its size. Raises `ModelError` without an end-of-sequence token: completions could not end.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token, so completions cannot end: set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(settings: Model, trust_remote_code: bool = False, lora: bool | None = None) -> PreTrainedModel:
    """Return the causal language model to train, without dropout unless `settings.dropout` is set.

    `lora`: whether an adapter will be trained on it; by default as the settings say.
    """
    from transformers import AutoModelForCausalLM

    path = model_path(settings.path)
    loader: Any = AutoModelForCausalLM
    adapter = (Path(path) / "adapter_config.json").is_file()
    if adapter:  # what a LoRA run saved: its adapter becomes part of its base
        from peft import AutoPeftModelForCausalLM

        loader = AutoPeftModelForCausalLM
    model = loader.from_pretrained(
        path,
        revision=settings.revision,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=trust_remote_code,
        **quantisation(settings, path, trust_remote_code),
    )
    if adapter:
        model = model.merge_and_unload().requires_grad_(True)
    try:
        adapted = settings.lora is not None if lora is None else lora
        model = ready(model, settings, adapted, merges=settings.save_merged is True)
    except ValueError as error:
        raise ModelError(str(error)) from error
    return model if settings.dropout else disable_dropout(model)


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout probability to 0: in modules, in what attention reads, and in the saved config."""
    zero_dropout(model)
    config = model.config
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        _zero(part)
    return model


def zero_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability in the modules of `model` to 0."""
    from torch.nn.modules.dropout import _DropoutNd

    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero(module)


def lora_config(settings: Lora) -> LoraConfig:
    """Return the settings as peft's configuration."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModelError("model.lora requires peft: pip install 'hf_rlhf[peft]'") from error
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )


def _zero(thing: torch.nn.Module | object) -> None:
    """Set to 0 every float named as a dropout: attention_dropout, resid_pdrop, layerdrop, ..."""
    for name, value in list(vars(thing).items()):
        if "drop" in name and type(value) is float:
            setattr(thing, name, 0.0)


def model_path(path: str | None) -> str:
    if path is None:
        raise ModelError("no model: set model.path (--model) to a folder, a name on the Hub, or builtin:addition")
    if path == BUILTIN:
        return str(addition_model())
    if not Path(path).expanduser().exists() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise ModelError(f"no model folder {path}")
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _template(text: str) -> str:
    """Return a chat template, or the text of the file it names."""
    if "\n" not in text and "{" not in text:
        file = Path(text).expanduser()
        if not file.is_file():
            raise ModelError(f"model.chat_template must be a Jinja template or a file, got {text!r}")
        return file.read_text(encoding="utf-8")
    return text
