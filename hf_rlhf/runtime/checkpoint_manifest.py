"""Complete checkpoints: a manifest with the hash of every file and of itself, written last. Without it a checkpoint does not
count."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from torch.serialization import get_crc32_options, set_crc32_options

from hf_rlhf.runtime.checkpoint_state import read_back
from hf_rlhf.runtime.errors import CheckpointError, DiskFull

logger = logging.getLogger(__name__)

MANIFEST = "rlhf_manifest.json"
DRAFT = MANIFEST + ".tmp"
HASH = "xxh3_128"
"""Hash of files, which takes a tenth of the time of SHA-256: no part of this guards against anything but damage."""
PIECE = 2 << 20
"""Bytes hashed at a time: fewer turns between the hashing thread and the one that trains."""
OWN_HASH = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"\n}\Z')
"""The end of a manifest: the SHA-256 of its text with zeros in this place."""
REQUIRED = {"step": int, "processes": int, "resumable": bool, "algorithm": dict, "run": dict, "files": dict}

FREE = re.compile(
    r"(update|critic|(kl\.\d+\.)?reference(\.of)?|rewards\.\d+)\.offload"
    r"|rewards\.\d+\.resources|critic\.device"
    r"|rollout\.(url|sync(\.\w+)?|serve|token_env|request_timeout|request_retries|max_wait|num_workers)"
)
"""Dotted paths of settings that do not affect results, so that a resumed run may change them."""
ANY = object()
"""Stands for a value that older checkpoints did not keep."""
ADDED = {
    "update.fused_loss": "auto",
    "update.old_logps": "auto",
    "training.per_device_train_batch_size": ANY,
    **{f"{section}.use_{kind}": False for section in ("model.lora", "peft") for kind in ("dora", "rslora")},
    "rollout.skip_special_tokens": True,
    "rollout.kernel": "model",
    "environment": [],
    "environment.N.history": "extend",
    "environment.N.workers": "inline",
    "environment.N.num_workers": 8,
    "model.chat_template_kwargs": {},
    "dataset.prompt_column": "prompt",
    "sampler": {"use": "shuffled"},
}
"""Dotted paths of settings that older checkpoints do not have, with what those were trained with; N is any number."""


LEAST_FREE = 1 << 16
"""Bytes: a disk with less is full."""


@contextmanager
def written_whole(folder: Path, args: Any) -> Iterator[None]:
    """Clear `folder`, and keep older checkpoints while Trainer writes a checkpoint into it; `rotate` deletes them later.

    Raises `DiskFull` where there is no space left for it; what was written is deleted then.
    """
    if args.should_save and folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)  # first: what is left of a checkpoint does not count
        shutil.rmtree(folder)
    limit, args.save_total_limit = args.save_total_limit, None
    checksums = get_crc32_options()
    set_crc32_options(False)  # torch.load reads no checksum of the archive, and the manifest has a better one
    try:
        with _deleted_if_full(folder):
            yield
    finally:
        set_crc32_options(checksums)
        args.save_total_limit = limit


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Load the state back, hash and flush every file and folder, and write the manifest, which completes the checkpoint.

    Raises `DiskFull` as `written_whole` does.
    """
    with _deleted_if_full(folder):
        read_back(folder)
        files = {}
        for path in files_in(folder):
            _sync(path)
            files[path.relative_to(folder).as_posix()] = {HASH: _hash(path, HASH), "bytes": path.stat().st_size}
        draft = folder / DRAFT
        with open(draft, "wb") as file:
            file.write(_text({**facts, "files": files}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, folder / MANIFEST)
        for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder, folder.parent):
            _sync(path)


@contextmanager
def _deleted_if_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_full(folder, error):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free >> 20
        raise DiskFull(
            f"no space left on the disk of {folder.parent} while {folder.name} was saved: {free} MiB are free without it. "
            "Make room, or keep fewer checkpoints with training.save_total_limit"
        ) from None


def _is_full(folder: Path, error: BaseException | None) -> bool:
    """Return whether an error, or one that it comes from, says that the disk is full, or the disk is: torch says neither."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "o space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return folder.exists() and shutil.disk_usage(folder).free < LEAST_FREE


def files_in(folder: Path) -> list[Path]:
    """Return the files of a checkpoint except its manifest."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, DRAFT))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest without checking the files. Raises `CheckpointError` if there is none, or it was damaged."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest: Any = json.loads(content)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was never completed, or is not a checkpoint of hf_rlhf"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    wrong = [
        name
        for name, kind in REQUIRED.items()
        if not isinstance(manifest, dict) or type(manifest.get(name)) is not kind
    ]
    if wrong:
        raise CheckpointError(f"{path} was damaged: it has no {wrong[0]}")
    own = OWN_HASH.search(content)
    whole = own is not None and hashlib.sha256(_blank(content)).hexdigest().encode() == own[1]
    if not whole and (own is not None or not _is_old(manifest)):
        raise CheckpointError(f"{path} was damaged: its text differs from its own hash")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Check every file and return the manifest. Raises `CheckpointError` naming the first file that differs.

    Files that the manifest does not list are reported in a warning.
    """
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            kind = HASH if HASH in facts else "sha256"
            if path.stat().st_size != facts["bytes"] or _hash(path, kind) != facts[kind]:
                raise CheckpointError(f"{path} was changed: its size or hash differs from the manifest")
        except CheckpointError:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be checked: {type(error).__name__}: {error}") from error
    unlisted = [name for p in files_in(folder) if (name := p.relative_to(folder).as_posix()) not in manifest["files"]]
    if unlisted:
        logger.warning("%s has files that its manifest does not list: %s", folder, ", ".join(unlisted))
    return manifest


def newest(output_dir: Path) -> Path:
    """Return the newest valid checkpoint in `output_dir` and warn about skipped ones. Raises `CheckpointError` without one."""
    reasons = []
    for folder in reversed(in_order(output_dir, damaged_last=True)):
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


def in_order(output_dir: Path, damaged_last: bool = False) -> list[Path]:
    """Return the checkpoints in `output_dir`: by run, then by step; those without a readable manifest are first, or last."""

    def order(folder: Path) -> tuple[bool, float, int]:
        step = int(folder.name.removeprefix("checkpoint-"))
        try:
            begun = read_manifest(folder).get("begun", 0.0)
        except CheckpointError:
            return damaged_last, 0.0, step
        return not damaged_last, begun, step

    found = output_dir.glob("checkpoint-*")
    return sorted((p for p in found if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)), key=order)


def rotate(newest_folder: Path, limit: int | None, best: str | None) -> None:
    """Delete all but `limit` checkpoints: incomplete ones first, then the lowest steps; never the newest or the best."""
    if limit is None:
        return
    kept = {newest_folder.resolve(), *([Path(best).resolve()] if best else [])}
    others = [p for p in in_order(newest_folder.parent) if p.resolve() not in kept]
    surplus = len(others) + len(kept) - max(limit, 1)
    for folder in others[: max(surplus, 0)]:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def check_same_run(
    folder: Path,
    manifest: dict[str, Any],
    record: dict[str, Any],
    processes: int | None,
    blends_away: bool = False,
    allowed: Collection[str] = (),
) -> None:
    """Check that a checkpoint comes from a run like this one. Raises `CheckpointError` naming the differences.

    `processes`: their number if it matters, which is within a rollout, whose rows belong to processes. `blends_away`: the
    device of the reference decides how its average is rounded, so that a changed `reference.offload` gives a warning.
    `allowed`: dotted paths below which differences give a warning.
    """
    if not manifest["resumable"]:
        raise CheckpointError(f"{folder} was saved with save_only_model: it cannot be resumed")
    changed = [d for key in ("algorithm", "run") for d in differences(manifest[key], record[key])]
    if processes is not None:
        changed += differences({"processes": manifest["processes"]}, {"processes": processes})
    changed += changed_contents(manifest.get("contents", {}), record.get("contents", {}))
    accepted = [line for line in changed if any(line.startswith((f"{name}:", f"{name}.")) for name in allowed)]
    refused = [line for line in changed if line not in accepted]
    if refused:
        raise CheckpointError(
            f"{folder} comes from another run:\n  "
            + "\n  ".join(refused)
            + "\nResume with the same recipe and the same files, choose another output folder, or accept a change by its name: "
            f"--allow-changed {refused[0].partition(':')[0]} (allow_changed in Python)"
        )
    for line in accepted:
        logger.warning("resuming %s with a change that was allowed: %s", folder, line)
    if not blends_away:
        return
    before, now = (list(_offloads_references(run["algorithm"])) for run in (manifest, record))
    if before != now:
        logger.warning(
            "reference.offload was %s in %s and is %s now: a CPU may round the reference's average differently from this device, "
            "so the run may differ from the uninterrupted one by rounding",
            *(_any_of(before), folder, _any_of(now)),
        )


def _offloads_references(algorithm: dict[str, Any]) -> Iterator[bool]:
    """Yield `offload` of the recipe's reference and of those of its KLs."""
    for chosen in (algorithm["reference"], *(kl.get("reference") for kl in algorithm.get("kl", ()))):
        yield bool(chosen and (chosen.get("offload") or (chosen.get("of") or {}).get("offload")))


def _any_of(offload: list[bool]) -> str:
    return str(any(offload)).lower()


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """Return the dotted paths at which two nested containers differ, with both values, except `FREE` ones."""
    if FREE.fullmatch(path):
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        paths = {k: f"{path}.{k}".lstrip(".") for k in (*saved, *now)}
        return [d for k, at in paths.items() for d in differences(saved.get(k, _added(at)), now.get(k), at)]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return [d for i, (a, b) in enumerate(zip(saved, now, strict=True)) for d in differences(a, b, f"{path}.{i}")]
    return [] if saved is ANY or saved == now else [f"{path}: {saved!r} in the checkpoint, {now!r} now"]


def _added(path: str) -> Any:
    return ADDED.get(re.sub(r"\.\d+(?=\.)", ".N", path))


def changed_contents(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each dataset, file or model whose content differs; what only one of the runs has is not compared."""
    return [
        f"{name}: {now[name]['of']} has other content than {saved[name]['of']} in the checkpoint's run"
        for name in saved
        if name in now and saved[name]["hash"] != now[name]["hash"]
    ]


def _text(manifest: dict[str, Any]) -> bytes:
    """Return a manifest's text, with its own hash at the end."""
    blank = json.dumps({**manifest, "manifest_sha256": "0" * 64}, indent=1).encode()
    return blank[: -len(b"0" * 64 + b'"\n}')] + hashlib.sha256(blank).hexdigest().encode() + b'"\n}'


def _blank(content: bytes) -> bytes:
    end = b"0" * 64 + b'"\n}'
    return content[: -len(end)] + end


def _is_old(manifest: dict[str, Any]) -> bool:
    """Return whether a manifest is from before manifests had a hash of their own: all its files have a SHA-256."""
    entries = manifest["files"].values()
    return "manifest_sha256" not in manifest and all(isinstance(x, dict) and "sha256" in x for x in entries)


def _hash(path: Path, kind: str) -> str:
    running = xxhash.xxh3_128() if kind == HASH else hashlib.new(kind)
    piece = memoryview(bytearray(min(PIECE, path.stat().st_size)))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(piece):
            running.update(piece[:size])
    digest: str = running.hexdigest()
    return digest


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
