"""Complete checkpoints: a manifest with the hash of every file, written last. Without it a checkpoint does not count."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

MANIFEST = "rlhf_manifest.json"
STATE = "rlhf_state_{rank}.pt"
FREE = re.compile(r"(update|critic|reference|rewards\.\d+)\.offload")
"""Dotted paths of settings that do not affect results, so that a resumed run may change them."""


ADDED = {
    "update.fused_loss": "auto",
    **{f"{section}.use_{kind}": False for section in ("model.lora", "peft") for kind in ("dora", "rslora")},
    "rollout.skip_special_tokens": True,
    "model.chat_template_kwargs": {},
    "dataset.prompt_column": "prompt",
}
"""Dotted paths of settings that older checkpoints do not have, with what those were trained with."""


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or of another run."""


@contextmanager
def written_whole(folder: Path, args: Any) -> Iterator[int | None]:
    """Remove an old manifest and keep older checkpoints while Trainer writes a checkpoint into `folder`.

    Yields `save_total_limit`, for `rotate` once the new manifest is written.
    """
    if args.should_save:
        (folder / MANIFEST).unlink(missing_ok=True)
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield limit
    finally:
        args.save_total_limit = limit


def save_state(folder: Path, rank: int, state: dict[str, Any]) -> None:
    """Save one process's part: buffer, stream, plugin state, meters."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / STATE.format(rank=rank))


def load_state(folder: Path, rank: int) -> dict[str, Any]:
    """Load what `save_state` wrote; only plain containers and tensors are read."""
    return torch.load(folder / STATE.format(rank=rank), map_location="cpu", weights_only=True)


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Save a module's state by name as safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    copied = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    save_file(copied, folder / "model.safetensors", metadata={"format": "pt"})


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Load what `save_tensors` wrote."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file to disk and write the manifest, which completes the checkpoint."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    draft = folder / (MANIFEST + ".tmp")
    with open(draft, "w") as file:
        json.dump({**facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest without checking the files. Raises `CheckpointError` if there is none."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was never completed, or is not a checkpoint of hf_rlhf"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from None
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Check every file and return the manifest. Raises `CheckpointError` naming the first file that differs."""
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != facts["bytes"] or _sha256(path) != facts["sha256"]:
            raise CheckpointError(f"{path} was changed: its size or SHA-256 differs from the manifest")
    return manifest


def newest(output_dir: Path) -> Path:
    """Return the newest valid checkpoint in `output_dir` and warn about skipped ones. Raises `CheckpointError` without one."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    reasons = []
    for folder in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning("skipping a checkpoint: %s", error)
            reasons.append(str(error))
        else:
            return folder
    detail = "; ".join(reasons) or "there is no checkpoint-* folder"
    raise CheckpointError(
        f"nothing to resume in {output_dir}: {detail}. Save with training.save_strategy=steps training.save_steps=50"
    )


def rotate(newest_folder: Path, limit: int | None, best: str | None) -> None:
    """Delete all but `limit` checkpoints: incomplete ones first, then the oldest; never the newest or the best."""
    kept = {newest_folder.resolve(), *([Path(best).resolve()] if best else [])}
    others = [p for p in newest_folder.parent.glob("checkpoint-*") if p.is_dir() and p.resolve() not in kept]
    others.sort(key=lambda p: ((p / MANIFEST).exists(), p.stat().st_mtime_ns))
    surplus = 0 if limit is None else len(others) + len(kept) - max(limit, 1)
    for folder in others[: max(surplus, 0)]:
        shutil.rmtree(folder)


def check_same_run(
    folder: Path, manifest: dict[str, Any], record: dict[str, Any], processes: int | None, blends_away: bool = False
) -> None:
    """Check that a checkpoint comes from a run like this one. Raises `CheckpointError` naming the differences.

    `processes`: their number if it matters, which is within a rollout, whose rows belong to processes. `blends_away`: the
    device of the reference decides how its average is rounded, so that a changed `reference.offload` gives a warning.
    """
    if not manifest["resumable"]:
        raise CheckpointError(f"{folder} was saved with save_only_model: it cannot be resumed")
    changed = [d for key in ("algorithm", "run") for d in differences(manifest[key], record[key])]
    if processes is not None:
        changed += differences({"processes": manifest["processes"]}, {"processes": processes})
    if changed:
        raise CheckpointError(
            f"{folder} comes from another run:\n  "
            + "\n  ".join(changed)
            + "\nResume with the same recipe, or choose another output folder"
        )
    if not blends_away:
        return
    before, now = (bool(run["algorithm"]["reference"].get("offload")) for run in (manifest, record))
    if before != now:
        logger.warning(
            "reference.offload was %s in %s and is %s now: a CPU may round the reference's average differently from this device, "
            "so the run may differ from the uninterrupted one by rounding",
            *(str(before).lower(), folder, str(now).lower()),
        )


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """Return the dotted paths at which two nested containers differ, with both values, except `FREE` ones."""
    if FREE.fullmatch(path):
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        paths = {k: f"{path}.{k}".lstrip(".") for k in (*saved, *now)}
        return [d for k, at in paths.items() for d in differences(saved.get(k, ADDED.get(at)), now.get(k), at)]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return [d for i, (a, b) in enumerate(zip(saved, now, strict=True)) for d in differences(a, b, f"{path}.{i}")]
    return [] if saved == now else [f"{path}: {saved!r} in the checkpoint, {now!r} now"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
