"""Fingerprints of what a run reads: rows, files of rewards and plugins, models. A resumed run must read the same content.

Files of up to 64 MiB are hashed whole. Of larger ones, which are weights, the size, the header of a safetensors file and
1 MiB in evenly spread pieces are hashed; of a model on the Hub, the commit is taken.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import xxhash

from hf_rlhf.axes import Plugin
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.builtin_tasks import TASKS

Contents = dict[str, dict[str, str]]
"""Dotted name -> what it is (`of`) and the hash of its content."""

WHOLE = 64 << 20
PIECES, PIECE = 16, 64 << 10
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".py")
NOT_OF_A_MODEL = ("rlhf_manifest.json", "trainer_state.json", "summary.json", "stages.json", "training_args.bin")
OWN = ("hf_rlhf", "hf_rlhf_plugins")


class RowHash:
    """A running hash of rows, in their order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def add(self, *parts: Any) -> None:
        """Add a row, or what is made of it."""
        try:
            text = json.dumps(parts, sort_keys=True, default=_opaque)
        except (TypeError, ValueError):  # keys of several types
            text = repr(parts)
        self._hash.update(text.encode())

    def hexdigest(self) -> str:
        """Return the hash of the rows so far."""
        digest: str = self._hash.hexdigest()
        return digest


def rows_hash(rows: Iterable[Any]) -> str:
    """Return the hash of all rows, in their order."""
    running = RowHash()
    for row in rows:
        running.add(row)
    return running.hexdigest()


def contents_of(plugins: Iterable[tuple[str, Plugin]], model: Model) -> Contents:
    """Return the fingerprint of each file, folder and Hub name in the settings of plugins and model, of functions, and of the
    files of plugins that are not the package's own.

    A setting with the metadata `{"written": True}`, such as a cache, is left out.
    """
    found: Contents = {}
    holders: list[tuple[str, Any]] = [*plugins, ("model", model)]
    for path, plugin in holders:
        kind = type(plugin)
        if kind.__module__.partition(".")[0] not in OWN:
            _note(found, path, kind.__qualname__, _source(kind))
        revision = getattr(plugin, "revision", None)
        for setting in fields(plugin):
            if not setting.metadata.get("written"):
                for place, value in _leaves(f"{path}.{setting.name}", getattr(plugin, setting.name)):
                    if isinstance(value, str):
                        _note_named(found, place, value, revision)
                    elif callable(value) and not isinstance(value, Plugin):
                        _note(found, place, getattr(value, "__name__", type(value).__name__), _source(value))
    return found


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(f"{place}.{i}", inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{place}.{key}", inner)
    else:
        yield place, value


def _note(found: Contents, name: str, of: str, digest: str | None) -> None:
    if digest is not None:
        found[name] = {"of": of, "hash": digest}


def _note_named(found: Contents, name: str, value: str, revision: str | None) -> None:
    """Add the fingerprint of what a setting names, if it names a file, a module's function, a folder or a model on the Hub."""
    place = value.rpartition(":")[0] if re.fullmatch(r"[^\n]+:[A-Za-z_]\w*", value) and value not in TASKS else value
    if place != value and not place.endswith(".py"):
        module = sys.modules.get(place)
        _note(found, name, value, None if module is None else _source(module))
        return
    try:
        path = TASKS[value].model() if value in TASKS else Path(place).expanduser()
        is_file, is_folder = path.suffix != "" and path.is_file(), path.is_dir()
    except (OSError, ValueError):
        return  # a text that is no path
    if is_file:
        _note(found, name, place, _file_hash(path))
    elif is_folder:
        _note(found, name, value, _model_hash(path))
        if base := _base_of(path):
            _note_named(found, f"{name}.base", base, None)
    else:
        _note(found, name, value, _commit(value, revision))


def _model_hash(folder: Path) -> str | None:
    """Return the fingerprint of a model's or adapter's folder; None for any other folder."""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "tokenizer_config.json")):
        return None
    files = [p for p in folder.iterdir() if p.suffix in MODEL_SUFFIXES and p.name not in NOT_OF_A_MODEL and p.is_file()]
    return rows_hash((p.name, _file_hash(p)) for p in sorted(files))


def _base_of(folder: Path) -> str | None:
    """Return the base that an adapter's folder names."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) and base else None


def _file_hash(path: Path) -> str:
    size, running = path.stat().st_size, xxhash.xxh3_128()
    with open(path, "rb") as file:
        if size <= WHOLE:
            running.update(file.read())
        else:
            header = 8 + int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
            header = header if header < size else 0
            file.seek(0)
            running.update(f"{size}:".encode() + file.read(header))
            for i in range(PIECES):
                file.seek(header + i * max(0, size - header - PIECE) // (PIECES - 1))
                running.update(file.read(PIECE))
    digest: str = running.hexdigest()
    return digest


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model in the cache of the Hub; None for what is no name of one."""
    from huggingface_hub import try_to_load_from_cache

    if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name):
        return None
    for file in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except ValueError:
            return None
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def _source(thing: Any) -> str | None:
    """Return the hash of a module's file, of the file of a class, or of a function's text; None without any."""
    bound: tuple[Any, ...] = ()
    while isinstance(thing, functools.partial):
        bound, thing = (*bound, thing.args, thing.keywords), thing.func
    module = thing if inspect.ismodule(thing) else sys.modules.get(getattr(thing, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if (inspect.ismodule(thing) or inspect.isclass(thing)) and file and getattr(module, "__name__", "") != "__main__":
        return _file_hash(Path(file)) if Path(file).is_file() else None
    try:
        text = inspect.getsource(thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing))
    except (OSError, TypeError):
        return None
    return rows_hash([text, *bound])


def _opaque(value: Any) -> Any:
    """Return what a value that JSON has no form for is compared by."""
    if isinstance(value, bytes | bytearray):
        return xxhash.xxh3_128_hexdigest(value)
    for plain in ("tolist", "isoformat", "tobytes"):
        if hasattr(value, plain):
            return getattr(value, plain)()
    return type(value).__qualname__
