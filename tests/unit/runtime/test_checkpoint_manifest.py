"""Checkpoints count only while every byte of them, the manifest's included, is what was sealed."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rlhf.runtime import checkpoint_manifest as manifests
from hf_rlhf.runtime.checkpoint_manifest import MANIFEST, CheckpointError

FACTS: dict[str, Any] = {"processes": 1, "resumable": True, "algorithm": {"kl": []}, "run": {"seed": 3}, "begun": 1.0}


def sealed(root: Path, step: int, **facts: Any) -> Path:
    """A checkpoint with a weights file and a state file."""
    folder = root / f"checkpoint-{step}"
    args = SimpleNamespace(should_save=True, save_total_limit=None)
    with manifests.written_whole(folder, args):
        (folder / "critic").mkdir(parents=True)
        (folder / "critic" / "model.safetensors").write_bytes(random.Random(step).randbytes(500))
        torch.save({"step": step}, folder / "rlhf_state_0.pt")
    manifests.seal(folder, {**FACTS, "step": step, **facts})
    return folder


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_no_flipped_bit_passes_and_each_falls_back_to_the_checkpoint_before(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    before, folder = sealed(tmp_path, 1), sealed(tmp_path, 2)
    draw = random.Random(0)
    for path in [folder / MANIFEST, *manifests.files_in(folder)]:
        for bit in draw.sample(range(8 * path.stat().st_size), 400 if path.name == MANIFEST else 20):
            flip(path, bit)
            with pytest.raises(CheckpointError):
                manifests.verify(folder)
            assert manifests.newest(tmp_path) == before, (path, bit)
            flip(path, bit)
    assert manifests.newest(tmp_path) == folder


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[1]", b"null", b"{}", b'{"files": 3}', b"[" * 200_000])
def test_a_manifest_that_is_no_manifest_is_passed_over(damage, tmp_path, caplog):
    before, folder = sealed(tmp_path, 1), sealed(tmp_path, 2)
    (folder / MANIFEST).write_bytes(damage)
    assert manifests.newest(tmp_path) == before
    assert "skipping a checkpoint" in caplog.text


def test_a_manifest_from_before_it_had_a_hash_is_read_and_its_damage_is_no_crash(tmp_path, caplog):
    import hashlib

    caplog.set_level(logging.CRITICAL)
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    entry = {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7}
    text = json.dumps({**FACTS, "step": 3, "files": {"model.safetensors": entry}}, indent=1)
    (folder / MANIFEST).write_text(text)
    assert manifests.newest(tmp_path) == folder
    for bit in random.Random(1).sample(range(8 * len(text)), 400):
        flip(folder / MANIFEST, bit)
        with suppress(CheckpointError):
            manifests.newest(tmp_path)
        flip(folder / MANIFEST, bit)


def test_files_that_the_manifest_does_not_list_are_reported(tmp_path, caplog):
    folder = sealed(tmp_path, 1)
    (folder / "critic" / "pytorch_model.bin").write_bytes(b"?")
    manifests.verify(folder)
    assert "does not list: critic/pytorch_model.bin" in caplog.text


def test_rotation_deletes_the_lowest_steps_whatever_their_times(tmp_path):
    folders = [sealed(tmp_path, step) for step in (2, 10, 9, 1)]
    for age, folder in enumerate(folders):
        os.utime(folder, (1000 * age, 1000 * age))
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-99").mkdir()
    manifests.rotate(sealed(tmp_path, 11), 3, best=str(tmp_path / "checkpoint-1"))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-1", "checkpoint-10", "checkpoint-11", "checkpoint-notes"]


def test_checkpoints_of_an_earlier_run_in_the_folder_are_older_whatever_their_steps(tmp_path):
    earlier = sealed(tmp_path, 20)
    later = sealed(tmp_path, 3, begun=2.0)
    assert manifests.newest(tmp_path) == later
    manifests.rotate(later, 1, best=None)
    assert not earlier.exists()


def test_folders_are_flushed_before_older_checkpoints_go(tmp_path, monkeypatch):
    sealed(tmp_path, 1)
    flushed = []
    sync = manifests._sync
    monkeypatch.setattr(manifests, "_sync", lambda path: (flushed.append(path), sync(path)))
    folder = sealed(tmp_path, 2)
    assert {folder, folder / "critic", tmp_path} <= set(flushed)
    assert (tmp_path / "checkpoint-1").exists()


def test_a_state_file_that_cannot_be_loaded_is_not_sealed(tmp_path):
    folder = tmp_path / "checkpoint-1"
    args = SimpleNamespace(should_save=True, save_total_limit=2)
    with manifests.written_whole(folder, args):
        folder.mkdir()
        torch.save({"state": {1: frozenset()}}, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt was written and cannot be loaded"):
        manifests.seal(folder, {**FACTS, "step": 1})
    assert args.save_total_limit == 2
    with pytest.raises(CheckpointError, match="never completed"):
        manifests.newest(tmp_path)


def test_what_was_left_in_the_folder_of_a_checkpoint_is_not_part_of_the_next_one(tmp_path):
    folder = sealed(tmp_path, 1)
    (folder / "rng_state_7.pth").write_bytes(b"of another number of processes")
    assert not (sealed(tmp_path, 1) / "rng_state_7.pth").exists()
    shutil.rmtree(folder)


def test_what_older_checkpoints_do_not_keep_of_an_environment_has_the_meaning_that_it_had() -> None:
    old = {"environment": [{"use": "echo", "max_turns": 8}, {"use": "echo", "max_turns": 8}]}
    added = {"history": "extend", "workers": "inline", "num_workers": 8}
    new = {"environment": [each | added for each in old["environment"]]}
    assert manifests.differences(old, new) == []
    new["environment"][1]["history"] = "as_rendered"
    assert manifests.differences(old, new) == ["environment.1.history: 'extend' in the checkpoint, 'as_rendered' now"]
