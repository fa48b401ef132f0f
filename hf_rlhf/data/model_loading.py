"""Load the policy and its tokenizer as recipes name them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.contract.model_settings import Lora, Model
from hf_rlhf.data.adapters import config_problems, keep_zero_rows
from hf_rlhf.data.addition_task import addition_config
from hf_rlhf.data.builtin_tasks import TASKS
from hf_rlhf.data.quantization import quantisation, ready
from hf_rlhf.modeling.lora_merge import merge
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.hub import Kind, unavailable

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelError(UserError, ValueError):
    """A model or tokenizer that cannot be used; the message says why and how to fix it."""


def load_config(path: str | None, revision: str | None = None, **options: Any) -> Any:
    """Return a model's configuration, for an adapter its base's. Raises `ModelError` if it cannot be had, as by `options`."""
    from transformers import AutoConfig

    if path in TASKS:
        return addition_config()
    local = path is not None and options.get("local_files_only")  # then the Hub is not asked either
    path = str(Path(path).expanduser()) if path is not None and local else model_path(path, revision=revision)
    if (base := _base_of(path)) is not None:
        return load_config(base, None, **options)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:  # KeyError: a model type that is unknown here
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"the configuration of {path} cannot be read: {reason}") from error


def without_weights(auto: Any, settings: Model, trust_remote_code: bool = False, **config: Any) -> Any:
    """Build a model on `meta` by a class of transformers, from what is on this machine. Raises `ModelError` if it cannot."""
    import torch

    if settings.path is None:
        raise ModelError("no model is named")
    code = {"trust_remote_code": trust_remote_code}
    found = load_config(settings.path, settings.revision, local_files_only=True, **code, **config)
    try:
        with torch.device("meta"):
            return auto.from_config(found, dtype=found.dtype if settings.dtype == "auto" else settings.dtype, **code)
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as error:  # code that needs real weights
        raise ModelError(f"the model cannot be built without weights ({error!r:.200})") from error


def load_tokenizer(
    settings: Model, trust_remote_code: bool = False, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer, ready for rollouts (see `prepare_tokenizer`)."""
    from transformers import AutoTokenizer

    revision = settings.revision if settings.tokenizer is None else None
    path = model_path(settings.tokenizer or settings.path, "tokenizer", revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} has no tokenizer: set model.tokenizer ({error})") from error
    return prepare_tokenizer(tokenizer, settings)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: Model) -> PreTrainedTokenizerBase:
    """Set padding to the left, as generation requires, with the end-of-sequence token if there is no padding token.

    It gets `settings.chat_template`, if that is set, and carries `settings.chat_template_kwargs` to every rendering. The
    vocabulary keeps its size. Raises `ModelError` without an end-of-sequence token: completions could not end.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token, so completions cannot end: set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if settings.chat_template is not None:
        tokenizer.chat_template = _template(settings.chat_template)
    tokenizer.chat_template_kwargs = dict(settings.chat_template_kwargs)
    return tokenizer


def load_model(
    settings: Model, trust_remote_code: bool = False, lora: bool | None = None, keep_adapter: bool = False
) -> PreTrainedModel:
    """Return the causal language model to train, without dropout unless `settings.dropout` is set.

    `lora`: whether an adapter will be trained on it; by default as the settings say. An adapter that the settings name is merged
    into its base, or with `keep_adapter` stays on it, as in the run that trained it.
    """
    path = model_path(settings.path, revision=settings.revision)
    options: dict[str, Any] = {"dtype": settings.dtype, "attn_implementation": settings.attn_implementation}
    options |= {"trust_remote_code": trust_remote_code, **quantisation(settings, path, trust_remote_code)}
    model = _whole(path, settings.revision, options, keep_adapter)
    try:
        adapted = settings.lora is not None if lora is None else lora
        model = ready(model, settings, adapted, merges=settings.save_merged is True)
    except ValueError as error:
        raise ModelError(str(error)) from error
    return model if settings.dropout else disable_dropout(model)


def _whole(path: str, revision: str | None, options: dict[str, Any], keep_adapter: bool = False) -> Any:
    """Load a causal model; an adapter, as a LoRA run saves it, is merged into its base, which may be an adapter in turn."""
    from transformers import AutoModelForCausalLM

    if (named := _base_of(path)) is None:
        model: Any = AutoModelForCausalLM.from_pretrained(path, revision=revision, **options)
        if hasattr(model, "peft_config"):
            raise ModelError(f"{path} is an adapter on the Hub. Download it, and set model.path to its folder")
        return model
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(path)
    if problems := list(config_problems(config)):
        raise ModelError(f"{path}: {'; '.join(problems)}")
    below = model_path(named)
    base = _resized(_whole(below, config.revision, options), Path(path))
    keep_zero_rows()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted: Any = PeftModel.from_pretrained(base, path)
        except (RuntimeError, ValueError, TypeError, UserWarning) as error:
            raise ModelError(f"the adapter in {path} does not fit its base {below}: {error}") from error
    if keep_adapter:
        return adapted
    model = merge(adapted).requires_grad_(True)
    model.name_or_path = model.config.name_or_path = path  # the base of an adapter that is trained on it
    return model


def _resized(base: Any, folder: Path) -> Any:
    """Resize the base's vocabulary to that of the model that was trained, whose embeddings are saved with the adapter then."""
    from safetensors import safe_open

    if not (file := folder / "adapter_model.safetensors").is_file():
        return base
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    named = [name for name, module in base.named_modules() if module in ends]
    keys = {f"base_model.model.{name}{part}.weight" for name in named for part in ("", ".base_layer")}
    with safe_open(file, "pt") as saved:
        rows = {key: saved.get_slice(key).get_shape()[0] for key in keys.intersection(saved.keys())}
    if rows and (count := max(rows.values())) != len(ends[0].weight):
        if len(rows) < 2 and not base.config.get_text_config().tie_word_embeddings:
            raise ModelError(
                f"{folder} was trained with a vocabulary of {count} tokens, and contains the new rows of {next(iter(rows))} "
                "alone. Train it again with model.save_merged=true"
            )
        base.resize_token_embeddings(count)
    return base


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout probability to 0: in modules, in what attention reads, and in the saved config."""
    zero_dropout(model)
    _zero(model.config.get_text_config())
    return model


def zero_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability in the modules of `model`, and in their configurations, to 0."""
    from torch.nn.modules.dropout import _DropoutNd

    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero(module)
        if hasattr(module, "config"):
            _zero(module.config)


def lora_config(settings: Lora) -> LoraConfig:
    """Return the settings as peft's configuration."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModelError("model.lora requires peft: pip install 'hf_rlhf[peft]'") from error
    return LoraConfig(
        task_type="CAUSAL_LM",
        **{{"alpha": "lora_alpha", "dropout": "lora_dropout"}.get(name, name): x for name, x in vars(settings).items()},
    )


def _zero(thing: torch.nn.Module | object) -> None:
    """Set to 0 every float named as a dropout: attention_dropout, resid_pdrop, layerdrop, ..."""
    for name, value in list(vars(thing).items()):
        if "drop" in name and type(value) is float:
            setattr(thing, name, 0.0)


def model_path(path: str | None, kind: Kind = "model", revision: str | None = None) -> str:
    """Return what transformers loads by a recipe's name of a model or tokenizer. Raises `ModelError` if nothing is there."""
    if path is None:
        raise ModelError("no model: set model.path (--model) to a folder, a name on the Hub, or builtin:addition")
    if path in TASKS:
        return str(TASKS[path].model())
    if problem := unavailable(path, kind, revision):
        raise ModelError(problem)
    folder = Path(path).expanduser()
    if kind == "model" and (base := _base_of(path)) is not None and (problem := unavailable(base, "model")):
        raise ModelError(f"the adapter {path} needs its base model: {problem}")
    return str(folder) if path.startswith("~") else path


def _base_of(path: str) -> str | None:
    """Return the base of the adapter in a folder; None without an adapter. Raises `ModelError` for one without another base."""
    folder = Path(path).expanduser()
    if not (file := folder / "adapter_config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{file} must be JSON, an object: {error}. Save the adapter again") from error
    if not base:
        raise ModelError(
            f"{path} is an adapter without its base: set base_model_name_or_path in its adapter_config.json"
        )
    if Path(base).expanduser().resolve() == folder.resolve():
        raise ModelError(f"{path} contains both an adapter and its base. Move the adapter to a folder of its own")
    return str(base)


def _template(text: str) -> str:
    """Return a chat template, or the text of the file it names."""
    if "\n" not in text and "{" not in text:
        file = Path(text).expanduser()
        if not file.is_file():
            raise ModelError(f"model.chat_template must be a Jinja template or a file, got {text!r}")
        return file.read_text(encoding="utf-8")
    return text
