"""A run of a staged recipe: what is finished is skipped, what was interrupted goes on, everything else is trained in turn.

In the output folder each stage has a folder of its own, as `hf-rlhf train` leaves it. `stages.json` holds the recipe of each
stage that has begun, and of which runs of earlier stages it read the output; `recipe.yaml` is the staged recipe as it was run;
`summary.json` is written at the end.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hf_rlhf.cli.runs.pipeline import Pipeline, PipelineStage, check_named, check_stages
from hf_rlhf.cli.runs.run import OWN_FILES, train, unused
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.signals import only_run_in

RECORD = "stages.json"
State = Literal["new", "begun", "finished"]


def choose_root(asked: str | None, name: str, resume: bool) -> Path:
    """The folder of this run. Raises `UserError` where another run lives there."""
    folder = Path(asked) if asked else Path("outputs") / name
    if not (folder / RECORD).exists():
        if any((folder / file).exists() for file in OWN_FILES):
            raise UserError(f"{folder} holds a run of a single recipe: say another --output-dir")
        return folder
    if resume:
        return folder
    if asked:
        raise UserError(
            f"{folder} already contains a run. Leave --no-resume out to continue it, or choose another --output-dir"
        )
    return unused(Path("outputs"), name)


def run_stages(staged: Pipeline, root: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Runs what is left of the stages; the summary that is also written to summary.json. Raises `UserError` before any model
    is loaded where a stage is refused, or is not the one that was begun in this folder."""
    check_named(staged)
    check_stages(staged, root, forecast=False)
    with only_run_in(root):
        return _run_stages(staged, root, trust_remote_code)


def _run_stages(staged: Pipeline, root: Path, trust_remote_code: bool) -> dict[str, Any]:
    record = _Record(root)
    states = {stage.name: record.state(stage.name) for stage in staged.stages}
    record.check(staged, states)
    _meet()  # every process has read what the first one is about to write
    if _first():
        _write(root / "recipe.yaml", staged.dump())
    with _wandb_group(root.name):
        return _run_each(staged, root, record, states, trust_remote_code)


def _run_each(
    staged: Pipeline, root: Path, record: _Record, states: dict[str, State], trust_remote_code: bool
) -> dict[str, Any]:
    summaries = {}
    for number, stage in enumerate(staged.stages, start=1):
        _say(f"stage {number} of {len(staged.stages)}: {stage.name}, recipe {stage.source}", states[stage.name])
        if states[stage.name] != "finished":
            _run(stage, record, states[stage.name], trust_remote_code)
        summaries[stage.name] = _of_stage(root / stage.name, stage)
    summary = {
        "recipe": staged.name,
        "stages": summaries,
        "seconds": sum(found["seconds"] for found in summaries.values()),
        "output_dir": str(root),
    }
    if _first():
        _write(root / "summary.json", json.dumps(summary, indent=1))
        from hf_rlhf.cli.runs.pipeline_console import show_stages
        from hf_rlhf.metrics.console import console

        show_stages(summary, console())
    return summary


class _Record:
    """stages.json: stage -> its recipe as written, and of each stage that it reads the digest of its summary."""

    def __init__(self, root: Path):
        self.root, self.file = root, root / RECORD
        try:
            self.stages: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        except ValueError as error:
            raise UserError(f"{self.file} cannot be read ({error}): say another --output-dir") from error

    def state(self, name: str) -> State:
        """How far a stage is. Its folder decides: who removes it wants it trained anew."""
        folder = self.root / name
        if name not in self.stages or not folder.is_dir():
            return "new"
        return "begun" if _digest(folder) is None else "finished"

    def check(self, staged: Pipeline, states: dict[str, State]) -> None:
        """Raises `UserError` naming what differs between the stages that were begun here and those of this run."""
        changed: list[str] = []
        for name in [name for name in self.stages if name not in states and (self.root / name).is_dir()]:
            changed.append(f"{name} was a stage, and is none now")
        for stage in staged.stages:
            if states[stage.name] == "new":
                continue
            saved = self.stages[stage.name]
            differing = checkpoint_manifest.differences(saved["recipe"], _plain(stage.recipe.raw))
            changed += [f"{stage.name}.{line}".replace(" in the checkpoint, ", " then, ") for line in differing]
            for source, digest in saved["inputs"].items():
                if states.get(source) != "finished" or _digest(self.root / source) != digest:
                    changed.append(f"{stage.name} read another run of {source} than the one that is there")
        if changed:
            raise UserError(
                f"{self.root} holds stages of another run:\n  "
                + "\n  ".join(changed)
                + "\nGo on with the same recipes, remove the folders of the stages that are to be trained anew, or say another "
                "--output-dir"
            )

    def begin(self, stage: PipelineStage) -> None:
        """Notes the recipe and the inputs of a stage that begins."""
        sources = {source for source, _ in stage.reads.values()}
        inputs = {source: _digest(self.root / source) for source in sorted(sources)}
        self.stages[stage.name] = {"recipe": _plain(stage.recipe.raw), "inputs": inputs}
        if _first():
            _write(self.file, json.dumps(self.stages, indent=1))


def _run(stage: PipelineStage, record: _Record, state: State, trust_remote_code: bool) -> None:
    """Trains one stage, from its newest whole checkpoint where it has one."""
    folder = record.root / stage.name
    whole = False
    if state == "begun":
        try:
            checkpoint_manifest.newest(folder)
            whole = True
        except checkpoint_manifest.CheckpointError:
            whole = False
    _meet()
    if not whole:
        if state == "begun" and _first():
            shutil.rmtree(folder)  # of an interrupted run without a checkpoint
        record.begin(stage)
        _meet()
    train(stage.placed(record.root), str(folder), whole, trust_remote_code)
    _meet()
    _finish_tracking()
    gc.collect()


def _of_stage(folder: Path, stage: PipelineStage) -> dict[str, Any]:
    """A stage's part of the summary: its own without plan and versions, and the last of what it logged in training."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    kept = {key: value for key, value in found.items() if key not in ("plan", "versions")}
    return {**kept, "recipe": stage.source, "last": _last_logged(folder / "metrics.jsonl")}


def _last_logged(file: Path) -> dict[str, float]:
    """Each metric of training as it was logged last; some are logged once per rollout."""
    last: dict[str, float] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        entry = json.loads(line)
        last |= entry if "loss" in entry else {}
    return last


def _digest(folder: Path) -> str | None:
    """Of the summary of a finished stage: no two runs have the same. None where there is none, or half of one."""
    try:
        content = (folder / "summary.json").read_bytes()
        json.loads(content)
    except (OSError, ValueError):
        return None
    return hashlib.sha256(content).hexdigest()


def _plain(raw: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(raw, default=str))


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _meet() -> None:
    """Waits for the other processes, where there are any."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _say(title: str, state: State) -> None:
    if _first():
        from rich.text import Text

        from hf_rlhf.metrics.console import console

        said = {"new": "", "begun": " (goes on)", "finished": " (finished before)"}[state]
        console().print(Text(f"\n{title}{said}", style="bold"), soft_wrap=True)


@contextmanager
def _wandb_group(name: str) -> Iterator[None]:
    """Inside, runs of W&B belong to this group, or to the one that the environment names."""
    own = "WANDB_RUN_GROUP" not in os.environ
    if own:
        os.environ["WANDB_RUN_GROUP"] = name
    try:
        yield
    finally:
        if own:
            del os.environ["WANDB_RUN_GROUP"]


def _finish_tracking() -> None:
    """Ends the run of W&B, so that the next stage has one of its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
