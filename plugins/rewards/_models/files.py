"""Access to a checkpoint's weights by name, without loading it: safetensors or torch files, in a folder or on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
BESIDE = ("value_head.safetensors", "value_head.bin")
"""Separate files of a value head, as LLaMA-Factory saves it."""


Kind = Literal["sequence", "token", "causal"]


class ModelFiles(NamedTuple):
    """Model to load, and its representation in memory."""

    path: str
    revision: str | None
    tokenizer: str | None
    dtype: str
    device: str
    offload: bool
    kwargs: dict[str, Any]
    kind: Kind
    chat_template_kwargs: dict[str, Any]
    words: tuple[str | int, ...] = ()
    """Vocabulary tokens whose logits are the labels of a causal model."""

    def key(self) -> tuple[str, ...]:
        """Return a key that is equal for the same model; rewritten files give another key."""
        files = sorted(Path(self.path).glob("*")) if Path(self.path).is_dir() else []
        stamps = [(file.name, file.stat().st_mtime_ns) for file in files]
        return (json.dumps(self, sort_keys=True, default=str), str(stamps))


class Stored:
    """Stored weights: `names` has all of them, `plain` those in the model's own files."""

    def __init__(self, path: str, revision: str | None):
        self._path, self._revision = path, revision
        self._files: dict[str, Path] = {}
        index = next((file for file in map(self._find, INDEXED) if file), None)
        if index is not None:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [file for file in map(self._find, shards) if file]
        else:
            files = [file for file in map(self._find, WHOLE) if file][:1]
        self._add(files)
        self.plain = set(self._files)
        self._add([file for file in map(self._find, BESIDE) if file][:1])
        self.names = set(self._files)

    def tensor(self, name: str) -> Tensor:
        """Load one weight into main memory."""
        file = self._files[name]
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        return _torch_file(file)[name]

    def _add(self, files: list[Path]) -> None:
        for file in files:
            self._files |= dict.fromkeys(_names(file), file)

    def _find(self, name: str) -> Path | None:
        from transformers.utils.hub import cached_file

        if Path(self._path).is_dir():
            file = Path(self._path) / name
            return file if file.is_file() else None
        found = cached_file(
            self._path,
            name,
            revision=self._revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None


def _names(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    return list(_torch_file(file))


def _torch_file(file: Path) -> dict[str, Tensor]:
    import torch

    found: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return found
