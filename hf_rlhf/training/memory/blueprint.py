"""The model that a configuration describes, without weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.data.addition_task import BUILTIN, addition_config
from hf_rlhf.data.model_loading import lora_config

if TYPE_CHECKING:
    from hf_rlhf.contract.model_settings import Model


class BlueprintError(ValueError):
    """A model that cannot be built without weights; the message says why."""


def named_config(settings: Model, trust_remote_code: bool) -> Any:
    """Return the configuration of the model that a recipe names. Raises `BlueprintError` if it is not on this machine."""
    if settings.path is None:
        raise BlueprintError("no model is named")
    try:
        return local_config(settings.path, settings.revision, trust_remote_code)
    except OSError as error:
        raise BlueprintError(f"the configuration of {settings.path} is not on this machine") from error
    except (ValueError, ImportError) as error:
        raise BlueprintError(first_line(error)) from error


def local_config(path: str, revision: str | None, trust_remote_code: bool = False) -> Any:
    """Return a model's configuration from a folder or the Hub's cache; for an adapter that of its base.

    Raises OSError or ValueError if it is not there.
    """
    from transformers import AutoConfig

    if path == BUILTIN:
        return addition_config()
    folder = Path(path).expanduser()
    if (adapter := folder / "adapter_config.json").is_file():
        return local_config(json.loads(adapter.read_text())["base_model_name_or_path"], None, trust_remote_code)
    place = str(folder) if folder.exists() else path
    return AutoConfig.from_pretrained(
        place, revision=revision, local_files_only=True, trust_remote_code=trust_remote_code
    )


def without_weights(auto: Any, config: Any, settings: Model, trust_remote_code: bool) -> Any:
    """Return a configuration's model on `meta`, by a class of transformers, in the dtype of the settings.

    Raises `BlueprintError` if code that comes with the model does not allow that.
    """
    import torch

    dtype = (getattr(config, "dtype", None) or "float32") if settings.dtype == "auto" else settings.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, ImportError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BlueprintError(f"the model cannot be built without weights ({reason})") from error


def with_adapter(model: Any, settings: Model, peft_config: Any) -> Any:
    """Return the model with the adapter that would be trained, if any; a model that has an adapter keeps it."""
    if hasattr(model, "peft_config") or (peft_config is None and settings.lora is None):
        return model
    from peft import get_peft_model

    chosen: Any = peft_config if peft_config is not None else lora_config(settings.lora)  # type: ignore[arg-type]
    return get_peft_model(_hollow(model), chosen, low_cpu_mem_usage=True)


def _hollow(model: Any) -> Any:
    """Return a copy of a model whose parameters and buffers are on `meta`."""
    import torch

    memo: dict[int, Any] = {}
    for x in (*model.parameters(), *model.buffers()):
        empty = x.detach().to("meta")
        memo[id(x)] = torch.nn.Parameter(empty, x.requires_grad) if isinstance(x, torch.nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
