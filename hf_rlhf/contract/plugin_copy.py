"""Copies of plugins in worker processes: sent as their settings, set up there."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pickle
import sys
from typing import Any, TypeVar

import cloudpickle

from hf_rlhf.batch import Context
from hf_rlhf.contract.base import Plugin, nested_of

P = TypeVar("P", bound=Plugin)


def fresh(plugin: P) -> P:
    """Return a plugin with the same settings that is not set up."""
    settings = {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin) if field.init}
    return type(plugin)(**settings)


def packed(plugin: Plugin, context: Context | None, **more: Any) -> bytes:
    """Pickle the parts from which a worker builds its copy, and `more`. Raises what pickle raises."""
    needs_setup = any(type(each).setup is not Plugin.setup for each in (plugin, *nested_of(plugin)))
    module = sys.modules.get(type(plugin).__module__)
    given: dict[str, Any] = {"plugin": plugin, "setup": needs_setup, "context": {"tokenizer": None}, **more}
    if needs_setup and context is not None:
        names = ("tokenizer", "seed", "chat_template_kwargs")
        given["context"] = {name: getattr(context, name) for name in names}
    place = (type(plugin).__module__, getattr(module, "__file__", None))
    return pickle.dumps({"path": sys.path, "module": place, "body": cloudpickle.dumps(given)})


def unpacked(body: bytes) -> tuple[Any, dict[str, Any]]:
    """Return the copy, not set up, and what was packed with it."""
    sent = pickle.loads(body)  # noqa: S301  (from the parent)
    sys.path[:] = [*sys.path, *(place for place in sent["path"] if place not in sys.path)]
    _import(*sent["module"])
    given: dict[str, Any] = pickle.loads(sent["body"])  # noqa: S301  (from the parent)
    return given.pop("plugin"), given


def set_up_copy(plugin: Plugin, given: dict[str, Any], device: str = "cpu") -> None:
    """Set up a copy and its nested plugins on `device`, if they have anything to set up."""
    if given["setup"]:
        import torch

        context = Context(device=torch.device(device), policy=None, **given["context"])
        for each in (plugin, *nested_of(plugin)):
            each.setup(context)


def close_copy(plugin: Plugin) -> None:
    """Close a copy and its nested plugins."""
    for each in (plugin, *nested_of(plugin)):
        each.close()


def _import(name: str, file: str | None) -> None:
    """Import the plugin's module under its name, from its file if no import finds it."""
    if name == "__main__":
        return
    try:
        importlib.import_module(name)
    except ImportError:
        if file is None:
            raise
        specification = importlib.util.spec_from_file_location(name, file)
        assert specification is not None
        assert specification.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
