"""One run of a pipeline: skip finished stages, resume an interrupted one, train the others in turn.

Each stage has a folder in the output folder, with the files of `hf-rlhf train`. `stages.json` holds the recipe of each stage
that has begun and the runs of earlier stages that it read; `recipe.yaml` is the pipeline as it was run; `summary.json` is
written at the end.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from hf_rlhf.cli.runs.next_steps import next_steps
from hf_rlhf.cli.runs.run import check, train, unused
from hf_rlhf.config.hub_names import check_hub_names
from hf_rlhf.config.json_schema import HEADER
from hf_rlhf.config.pipeline import OUTPUT_OF, Pipeline, PipelineStage
from hf_rlhf.config.plan import Plan
from hf_rlhf.config.plugin_tree import walk
from hf_rlhf.config.recipe import OfflineRecipe, Recipe
from hf_rlhf.metrics.live_view import LiveView, console
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.errors import CheckpointError, UserError
from hf_rlhf.runtime.hub_push import PushError
from hf_rlhf.runtime.run_folder import RUN_FILES, only_run_in

logger = logging.getLogger(__name__)

RECORD = "stages.json"
State = Literal["new", "begun", "finished"]


def choose_root(asked: str | None, name: str, resume: bool) -> Path:
    """Return the folder of this run. Raises `UserError` where it contains another run."""
    folder = Path(asked) if asked else Path("outputs") / name
    if not (folder / RECORD).exists():
        if any((folder / file).exists() for file in RUN_FILES):
            raise UserError(f"{folder} contains the run of a single recipe. Choose another --output-dir")
        return folder
    if resume:
        return folder
    if asked:
        raise UserError(
            f"{folder} already contains a run. Leave --no-resume out to continue it, or choose another --output-dir"
        )
    return unused(Path("outputs"), name)


def run_stages(
    staged: Pipeline,
    root: Path,
    trust_remote_code: bool = False,
    view: LiveView | None = None,
    show_completions: int | None = None,
) -> dict[str, Any]:
    """Run the stages that are not finished and return the content of summary.json.

    `view`: where to show them, one view each by default. `show_completions`: steps between completions to print.
    Raises `UserError` before any model is loaded where a stage is refused, or differs from the one that was begun here.
    """
    check_named(staged)
    for stage in staged.stages:
        check_hub_names([*stage.recipe.sections.items(), *walk(stage.recipe.plugins)])
    with doing("checking the recipes"):
        check_stages(staged, root, forecast=False)
    options = {"trust_remote_code": trust_remote_code, "view": view, "show_completions": show_completions}
    with only_run_in(root):
        return _run_stages(staged, root, options)


def check_stages(staged: Pipeline, root: Path, forecast: bool = True) -> dict[str, Plan]:
    """Return the plan of each stage without loading a model. Raises `UserError` with every refusal of any stage."""
    plans, refused = {}, []
    for stage in staged.stages:
        recipe = stage.placed(root)
        recipe.model = _first_model(staged, stage, recipe)
        try:
            plan = plans[stage.name] = check(recipe, str(root / stage.name), forecast=forecast)
        except UserError as error:
            refused.append(f"stage {stage.name}: {error}")
            continue
        folders = {source: root.absolute() / source for source, _ in stage.reads.values()}
        absent = {str(folder): source for source, folder in folders.items() if not folder.is_dir()}
        for place, note in enumerate(plan.memory_notes):
            for folder, source in absent.items():
                if folder in note:
                    plan.memory_notes[place] = f"without what stage {source} will leave in {root / source}"
    if refused:
        raise UserError("\n".join(refused))
    return plans


def check_named(staged: Pipeline) -> None:
    """Raise `UserError` where a stage has no model or no dataset."""
    lacking = [
        f"stage {stage.name} has no {what}: set {stage.name}.{what}.path=..."
        for stage in staged.stages
        for what, section in (("model", stage.recipe.model), ("dataset", stage.recipe.dataset))
        if section.path is None
    ]
    if lacking:
        raise UserError("\n".join(lacking))


def _first_model(staged: Pipeline, stage: PipelineStage, recipe: Recipe) -> Any:
    """Return the recipe's model with the path of its first weights, since outputs of stages do not exist yet."""
    model, path = copy.copy(recipe.model), stage.recipe.model.path
    while path is not None and path.startswith(OUTPUT_OF):
        source = path.removeprefix(OUTPUT_OF).partition("/")[0]
        path = staged.stage(source).recipe.model.path
    model.path = path
    return model


def _run_stages(staged: Pipeline, root: Path, options: dict[str, Any]) -> dict[str, Any]:
    record = _Record(root)
    states = {stage.name: record.state(stage.name) for stage in staged.stages}
    record.check(staged, states)
    _meet()  # every process has read the files that the first one is about to write
    if _first():
        _write(root / "recipe.yaml", HEADER + staged.dump())
    with _tracked_together(root):
        return _run_each(staged, root, record, states, options)


def _run_each(
    staged: Pipeline, root: Path, record: _Record, states: dict[str, State], options: dict[str, Any]
) -> dict[str, Any]:
    summaries = {}
    for number, stage in enumerate(staged.stages, start=1):
        _say(f"stage {number} of {len(staged.stages)}: {stage.name}, recipe {stage.source}", states[stage.name])
        if states[stage.name] != "finished":
            _run(stage, record, states[stage.name], options)
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

        last = staged.stages[-1]
        folder = root / last.name
        plan = json.loads((folder / "summary.json").read_text())["plan"]
        show_stages(summary, console(), next_steps(last.placed(root), folder, plan, options["trust_remote_code"]))
    return summary


class _Record:
    """`stages.json`: each stage's recipe, and the digest of the summary of each stage that it reads."""

    def __init__(self, root: Path):
        self.root, self.file = root, root / RECORD
        try:
            self.stages: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        except ValueError as error:
            raise UserError(f"{self.file} cannot be read ({error}). Choose another --output-dir") from error

    def state(self, name: str) -> State:
        """Return the state of a stage. Its folder decides: removing it makes the stage train again."""
        folder = self.root / name
        if name not in self.stages or not folder.is_dir():
            return "new"
        return "begun" if _digest(folder) is None else "finished"

    def check(self, staged: Pipeline, states: dict[str, State]) -> None:
        """Raise `UserError` naming the differences between the stages begun here and those of this run."""
        changed: list[str] = []
        for name in [name for name in self.stages if name not in states and (self.root / name).is_dir()]:
            changed.append(f"{name} was a stage and is no longer one")
        for stage in staged.stages:
            if states[stage.name] == "new":
                continue
            saved = self.stages[stage.name]
            differing = checkpoint_manifest.differences(saved["recipe"], _plain(stage.recipe.raw))
            changed += [f"{stage.name}.{line}".replace(" in the checkpoint, ", " then, ") for line in differing]
            for source, digest in saved["inputs"].items():
                if states.get(source) != "finished" or _digest(self.root / source) != digest:
                    changed.append(f"{stage.name} read another run of {source} than the one in this folder")
        if changed:
            raise UserError(
                f"{self.root} contains stages of another run:\n  "
                + "\n  ".join(changed)
                + "\nContinue with the same recipes, remove the folders of the stages to train again, or choose another "
                "--output-dir"
            )

    def begin(self, stage: PipelineStage) -> None:
        """Record the recipe and the inputs of a stage that begins."""
        sources = {source for source, _ in stage.reads.values()}
        inputs = {source: _digest(self.root / source) for source in sorted(sources)}
        self.stages[stage.name] = {"recipe": _plain(stage.recipe.raw), "inputs": inputs}
        if _first():
            _write(self.file, json.dumps(self.stages, indent=1))


def _run(stage: PipelineStage, record: _Record, state: State, options: dict[str, Any]) -> None:
    """Train one stage, from its newest whole checkpoint where it has one."""
    folder = record.root / stage.name
    whole = False
    if state == "begun":
        with suppress(CheckpointError):
            checkpoint_manifest.newest(folder)
            whole = True
    _meet()
    if not whole:
        if state == "begun" and _first():
            shutil.rmtree(folder)  # an interrupted run without a checkpoint
        record.begin(stage)
        _meet()
    recipe = stage.placed(record.root)
    if isinstance(recipe, OfflineRecipe):  # nothing is sampled
        options = {**options, "show_completions": None}
    try:
        train(recipe, str(folder), whole, **options)
    except PushError as error:  # the stage is complete, and the next reads it from its folder
        logger.warning("%s: %s", stage.name, error)
    _meet()
    gc.collect()


def _of_stage(folder: Path, stage: PipelineStage) -> dict[str, Any]:
    """Return a stage's part of the summary: its own without plan and versions, and its last training metrics."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    kept = {key: value for key, value in found.items() if key not in ("plan", "versions")}
    return {**kept, "recipe": stage.source, "last": _last_logged(folder / "metrics.jsonl")}


def _last_logged(file: Path) -> dict[str, float]:
    """Return the last value of each training metric; some are logged once per rollout."""
    last: dict[str, float] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        entry = json.loads(line)
        last |= entry if "loss" in entry else {}
    return last


def _digest(folder: Path) -> str | None:
    """Return the digest of a finished stage's summary, which differs between runs; None without a whole summary."""
    try:
        content = (folder / "summary.json").read_bytes()
        json.loads(content)
    except (OSError, ValueError):
        return None
    return hashlib.sha256(content).hexdigest()


def _plain(raw: Any) -> Any:
    """Return the value as JSON returns it."""
    return json.loads(json.dumps(raw, default=str))


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _meet() -> None:
    """Wait for the other processes, if there are any."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _say(title: str, state: State) -> None:
    if _first():
        from rich.text import Text

        said = {"new": "", "begun": " (resumes)", "finished": " (finished before)"}[state]
        console().print(Text(f"\n{title}{said}", style="bold"), soft_wrap=True)


@contextmanager
def _tracked_together(root: Path) -> Iterator[None]:
    """Inside, stages are a group in W&B, and trackio has one folder, unless the environment says otherwise."""
    own = {"WANDB_RUN_GROUP": root.name, "TRACKIO_DIR": str(root.absolute() / "trackio")}
    own = {name: value for name, value in own.items() if name not in os.environ}
    os.environ |= own
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
