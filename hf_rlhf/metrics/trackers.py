"""Trackers of Trainer's `report_to`: one run each, in the output folder; what Weights & Biases gets besides metrics.

Trainer ends a tracker's run with training; here it lasts until `close`, so that the closing evaluation belongs to it. An error
of a tracker never stops training.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import shlex
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)
from transformers.integrations.integration_utils import default_logdir

from hf_rlhf.contract.pattern import Finding
from hf_rlhf.metrics.doctor_callback import DoctorCallback
from hf_rlhf.metrics.names import ONCE, STEP, TABLE, Named, globbed, tracked
from hf_rlhf.runtime.wandb_account import abandon, has_account, server_problem

logger = logging.getLogger(__name__)

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
LONGEST_TAG = 64
"""Most characters of a tag in W&B."""
ROWS_IN_TABLE = 10_000
"""Completions after which a new table starts in W&B, as it is held in memory."""
TABLE_EVERY_S, TABLE_PATIENCE, TABLE_SHARE = 60.0, 200, 0.02
"""Minimum wait between two parts of the table in W&B: seconds, multiples of the last part's duration, share of the run so
far. Each part is hashed and written as files, and the newest 100 are shown."""
ASK_AGAIN_S = 30.0
"""Seconds until a server of W&B that did not answer is asked again."""
INIT_TIMEOUT_S = 5.0
"""Seconds that W&B's server may take to answer at the start and at the end; WANDB_INIT_TIMEOUT overrides it."""


def prepare(args: Any) -> None:
    """Place trackio's files in the output folder unless TRACKIO_DIR is set. It reads the variable once, when it is imported."""
    if "trackio" in (args.report_to or ()) and "trackio" not in sys.modules:
        os.environ.setdefault("TRACKIO_DIR", str(_folder(args) / "trackio"))


def install(
    handler: Any, args: Any, run_log: Any, doctor: DoctorCallback, record: dict[str, Any]
) -> Callable[[], None]:
    """Replace Trainer's W&B and MLflow callbacks, guard every reporting callback, and return what ends their runs.

    Each stays an instance of Trainer's class, so that `trainer.remove_callback(WandbCallback)` finds it. The doctor's findings
    become alerts of W&B.
    """
    classes = tuple(get_reporting_integration_callbacks(args.report_to or []))
    ends = ExitStack()
    for i, callback in enumerate(handler.callbacks):
        if callback is run_log or callback is doctor:
            guard(callback, patience=None)
        elif classes and isinstance(callback, classes):
            if type(callback) is WandbCallback:
                callback = WandbTracker(record, run_log, doctor.declared)
                doctor.listeners.append(lambda finding, tracker=callback: tracker.alert(finding))  # type: ignore[misc]
            elif type(callback) is MLflowCallback:
                callback = MlflowTracker()
            elif isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(_folder(args) / default_logdir())
            handler.callbacks[i] = guard(callback)
            ends.callback(callback.finish if isinstance(callback, WandbTracker) else _postponed_end(callback))
    end = weakref.finalize(handler, ends.close)
    end.atexit = False  # trackers have hooks of their own
    return end


def _folder(args: Any) -> Path:
    return Path(args.output_dir or "outputs").absolute()


def _postponed_end(tracker: TrainerCallback) -> Callable[[], None]:
    """Return what `on_train_end` would do: most trackers end their run there, and an evaluation after it would begin another."""
    end = tracker.on_train_end
    calls: list[Callable[[], None]] = []

    def later(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = {name: kwargs[name] for name in ("model", "processing_class") if name in kwargs}
        calls[:] = [functools.partial(end, args, state, control, **kept)]

    tracker.on_train_end = later  # type: ignore[method-assign]

    def end_now() -> None:
        for call in calls:
            call()

    return end_now


def guard(callback: TrainerCallback, patience: int | None = 3) -> TrainerCallback:
    """Make a callback drop its errors, and return it.

    The first one is logged as a warning; after `patience` in a row the callback is disabled (None: never).
    """
    failures, name, warned = 0, type(callback).__name__, False

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal failures, warned
            if patience is not None and failures >= patience:
                return None
            try:
                result = method(*args, **kwargs)
            except Exception as error:
                failures += 1
                if not warned:
                    logger.warning(
                        "%s failed; training continues without it. %s: %s", name, type(error).__name__, error
                    )
                warned = True
                return None
            failures = 0
            return result

        return call

    for event in (*EVENTS, "finish", "alert"):
        if hasattr(callback, event):
            setattr(callback, event, guarded(getattr(callback, event)))
    return callback


class MlflowTracker(MLflowCallback):
    """Trainer's callback, with a database in the output folder unless the environment or the program sets a tracking URI."""

    _own = False

    def setup(self, args: Any, state: Any, model: Any) -> None:
        """Start the run."""
        if state.is_world_process_zero and not self._ml_flow.is_tracking_uri_set() and not self._ml_flow.active_run():
            _folder(args).mkdir(parents=True, exist_ok=True)
            self._ml_flow.set_tracking_uri(f"sqlite:///{_folder(args) / 'mlflow.db'}")
            self._own = True
        super().setup(args, state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run."""
        super().on_train_end(args, state, control, **kwargs)
        if self._own:
            self._ml_flow.set_tracking_uri("")  # that of the next run


class WandbTracker(WandbCallback):
    """Trainer's callback, with labels and a config to compare runs by, and completions as a growing table.

    Without an account, or if the server does not answer, the run is logged offline. Its files are in the output folder unless
    WANDB_DIR is set.
    """

    def __init__(self, record: dict[str, Any], run_log: Any, declared: Sequence[Named] = ()):
        super().__init__()
        self.reads_checkpoints = self._log_model.value == "checkpoint"
        self._record, self._run_log, self._declared = record, run_log, declared
        self._table: Any = None
        self._started: Any = None
        self._waiting: list[dict[str, Any]] = []
        self._began, self._due = time.monotonic(), -math.inf
        self._asked = -math.inf
        self._problem: str | None = None

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Start the run, fill its config, and define what its summary keeps of each metric."""
        if state.is_world_process_zero and self._wandb.run is None and state.trial_name is None:
            self._start(args.run_name, _folder(args))
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            run = self._wandb.run
            run.config.update(config_of(self._record), allow_val_change=True)
            for name, summary in summaries(self._declared).items():
                run.define_metric(name, step_metric=STEP, summary=summary)

    def _start(self, name: str | None, folder: Path) -> None:
        options = {"project": os.environ.get("WANDB_PROJECT", "hf_rlhf"), "name": name, **labels(self._record)}
        if "WANDB_DIR" not in os.environ:
            folder.mkdir(parents=True, exist_ok=True)
            options["dir"] = str(folder)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else 10 s at the end where nothing outside is reached
        settings = self._wandb.setup().settings
        if settings.mode in ("offline", "disabled", "dryrun"):
            self._wandb.init(**options)
        elif not has_account(settings):
            self._offline("no Weights & Biases account found", options)
        elif problem := server_problem(settings, limit := _init_timeout(settings)):
            self._offline(f"Weights & Biases did not start ({problem})", options)
        else:
            try:
                self._wandb.init(settings=self._wandb.Settings(init_timeout=limit), **options)
            except Exception as error:
                reason = str(error).strip().split("\n")[0]
                self._offline(f"Weights & Biases did not start ({reason})", options)
        self._started = self._wandb.run

    def _offline(self, why: str, options: dict[str, Any]) -> None:
        self._wandb.init(mode="offline", **options)
        logger.warning("%s: logging offline. %s", why, _uploads_later(self._wandb.run))

    def _silent(self) -> str | None:
        """Return why the server of the run does not answer, None if it does. A silent one is asked every `ASK_AGAIN_S`."""
        if self._wandb.run.offline or self._wandb.run.disabled:
            return None
        if self._problem is None or time.monotonic() - self._asked > ASK_AGAIN_S:
            self._problem = server_problem(self._wandb.run.settings, _init_timeout(self._wandb.setup().settings))
            self._asked = time.monotonic()
        return self._problem

    def alert(self, finding: Finding) -> None:
        """Send a finding of the doctor as an alert of the run."""
        about = f" ({finding.metric})" if finding.metric else ""
        told = f"\n\nTry: {' '.join(finding.overrides)}" if finding.overrides else ""
        text = f"Since step {finding.step}: {finding.text}{told}"
        self._wandb.run.alert(title=f"{finding.pattern}{about}", text=text, level=self._wandb.AlertLevel.WARN)

    def finish(self) -> None:
        """End the run if it was started here; failed if an exception is being handled. A silent server is not waited for."""
        run = self._started
        if run is None or self._wandb.run is not run:
            return
        if problem := self._silent():
            abandon(run)
            logger.warning("Weights & Biases did not end the run (%s). %s", problem, _uploads_later(run))
        else:
            self._wandb.finish(exit_code=int(sys.exc_info()[0] is not None))

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        """Log the numbers, and the waiting completions as the next part of the table at its time."""
        super().on_log(args, state, control, model=model, logs=logs, **kwargs)
        if state.is_world_process_zero:
            self._waiting = [*self._waiting, *self._run_log.completions][-ROWS_IN_TABLE:]
            if time.monotonic() >= self._due:
                self._send(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send the waiting completions before a checkpoint."""
        self._send(state)
        super().on_save(args, state, control, **kwargs)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        """Send the waiting completions."""
        self._send(state)
        super().on_train_end(args, state, control, model=model, processing_class=processing_class, **kwargs)

    def _send(self, state: Any) -> None:
        """Send the waiting rows as the next part of `samples/completions`, for which W&B waits for its server."""
        if not self._waiting:
            return
        began = time.monotonic()
        try:
            if not self._silent():
                self._send_table(state)
        finally:
            now = time.monotonic()
            self._due = now + max(TABLE_EVERY_S, TABLE_PATIENCE * (now - began), TABLE_SHARE * (now - self._began))

    def _send_table(self, state: Any) -> None:
        rows, self._waiting = self._waiting, []
        for columns, part in itertools.groupby(rows, key=list):
            if self._table is None or self._table.columns != columns or len(self._table.data) >= ROWS_IN_TABLE:
                self._table = self._wandb.Table(columns=columns, allow_mixed_types=True, log_mode="INCREMENTAL")
            *most, last = ([*row.values()] for row in part)
            self._table.data.extend(most)  # add_data would look at every cell, whose types are mixed anyway
            self._table.add_data(*last)
            self._wandb.log({TABLE: self._table, STEP: state.global_step})


def _uploads_later(run: Any) -> str:
    return f"`wandb sync {shlex.quote(str(Path(run.dir).parent))}` uploads the run later"


def _init_timeout(settings: Any) -> float:
    return settings.init_timeout if "WANDB_INIT_TIMEOUT" in os.environ else INIT_TIMEOUT_S


def summaries(declared: Sequence[Named]) -> dict[str, str]:
    """Map each metric (an open name ends in a star) to what the summary keeps of it."""
    found: dict[str, str] = {}
    for named in declared:
        if named.name not in ONCE:
            kept = named.metric.summary
            found.setdefault(globbed(tracked(named.name)), kept if kept == "last" else f"{kept},last")
    return found


def labels(record: dict[str, Any]) -> dict[str, Any]:
    """Return group, job type and tags of the run, unless WANDB_RUN_GROUP, WANDB_JOB_TYPE or WANDB_TAGS sets them.

    Runs of one recipe, and stages of one pipeline, are a group; the job is `train` with rollouts, else the trainer.
    """
    chosen, name = choices(record), record.get("name") or "recipe"
    group, _, stage = name.partition("/")
    trainer = chosen.get("trainer")
    tags = [group, *([stage] if stage else [])]
    tags += [f"{key}={chosen[key]}" for key in ("advantages", "policy_loss", "kl", "trainer") if key in chosen]
    found = {
        "group": ("WANDB_RUN_GROUP", group),
        "job_type": ("WANDB_JOB_TYPE", trainer or "train"),
        "tags": ("WANDB_TAGS", [tag[:LONGEST_TAG] for tag in dict.fromkeys(tags)]),
    }
    return {key: value for key, (variable, value) in found.items() if variable not in os.environ}


def config_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the run's config: flat choices to group and filter by, and the full recipe, algorithm, plan and versions."""
    whole = {key: record.get(key) for key in ("algorithm", "plan", "versions")}
    return {**choices(record), "recipe": record.get("name"), "resolved_recipe": record.get("recipe"), **whole}


def choices(record: dict[str, Any]) -> dict[str, str]:
    """Map each axis to its plugins' names in order, and `plugins` to all of them with their packages."""
    manifest = (record.get("plan") or {}).get("plugins") or ()
    found: dict[str, str] = {}
    for axis, names in _top(record.get("algorithm") or {}).items():
        found[axis] = "+".join(names) or "none"
    return {**found, "plugins": " ".join(sorted({f"{x['package']}/{x['axis']}.{x['name']}" for x in manifest}))}


def _top(algorithm: dict[str, Any]) -> dict[str, list[str]]:
    """Map each axis to the names of its plugins at the top of the recipe."""
    found: dict[str, list[str]] = {}
    for axis, value in algorithm.items():
        plugins = value if isinstance(value, list) else [value]
        if all(isinstance(plugin, dict) and "use" in plugin for plugin in plugins):
            found[axis] = [plugin.get("label") or plugin["use"] for plugin in plugins]
    return found
