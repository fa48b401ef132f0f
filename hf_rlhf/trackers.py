"""The trackers of Trainer's `report_to`: what Weights & Biases gets besides the numbers, and why none can stop a run."""

from __future__ import annotations

import functools
import logging
import netrc
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from transformers import TrainerCallback
from transformers.integrations import WandbCallback, get_reporting_integration_callbacks

logger = logging.getLogger(__name__)

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
SUMMARISED = ("train/reward/total/mean", "eval/reward/total/mean", "eval/accuracy")
"""Metrics of which the run's summary keeps the best next to the last."""
ROWS_IN_TABLE = 10_000
"""Completions after which the table in W&B starts anew, as it is held in memory."""
INIT_TIMEOUT_S = 8.0
"""How long the server of W&B may take to answer at the start (WANDB_INIT_TIMEOUT sets another)."""


def install(handler: Any, report_to: list[str], run_log: Any, record: dict[str, Any]) -> None:
    """Makes Trainer's W&B callback ours and guards every reporting callback.

    Each stays an instance of Trainer's class, so that `trainer.remove_callback(WandbCallback)` finds it.
    """
    classes = tuple(get_reporting_integration_callbacks(report_to))
    for i, callback in enumerate(handler.callbacks):
        if callback is run_log:
            guard(callback, patience=None)
        elif classes and isinstance(callback, classes):
            handler.callbacks[i] = guard(WandbTracker(record, run_log) if type(callback) is WandbCallback else callback)


def guard(callback: TrainerCallback, patience: int | None = 3) -> TrainerCallback:
    """The callback, whose errors are dropped from now on.

    The first is a warning; after `patience` in a row the callback is not called any more (None: it always is).
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
                    logger.warning("%s failed; training goes on without it. %s: %s", name, type(error).__name__, error)
                warned = True
                return None
            failures = 0
            return result

        return call

    for event in EVENTS:
        setattr(callback, event, guarded(getattr(callback, event)))
    return callback


class WandbTracker(WandbCallback):
    """Trainer's callback, with the run's record in the config and completions as a growing table.

    Without an account, or where the server does not answer, the run is written offline: `wandb sync` uploads it later.
    """

    def __init__(self, record: dict[str, Any], run_log: Any):
        super().__init__()
        self._record, self._run_log = record, run_log
        self._table: Any = None

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Starts the run, and puts the resolved recipe, the plan and the plugin manifest into its config."""
        if state.is_world_process_zero and self._wandb.run is None and state.trial_name is None:
            self._start(args.run_name)
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            run = self._wandb.run
            run.config.update(
                {key: self._record.get(key) for key in ("recipe", "algorithm", "plan", "versions")},
                allow_val_change=True,
            )
            for name in SUMMARISED:
                run.define_metric(name, step_metric="train/global_step", summary="max,last")

    def _start(self, name: str | None) -> None:
        options = {"project": os.environ.get("WANDB_PROJECT", "hf_rlhf"), "name": name}
        settings = self._wandb.setup().settings
        if settings.mode in ("offline", "disabled", "dryrun"):
            self._wandb.init(**options)
        elif not _has_account(settings):
            logger.warning("no Weights & Biases account found: logging offline (`wandb sync` uploads it later)")
            self._wandb.init(mode="offline", **options)
        else:
            patience = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": INIT_TIMEOUT_S}
            try:
                self._wandb.init(settings=self._wandb.Settings(**patience), **options)
            except Exception as error:
                logger.warning(
                    "Weights & Biases did not start (%s): logging offline", str(error).strip().split("\n")[0]
                )
                self._wandb.init(mode="offline", **options)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        """The numbers, and the completions since the last entry as rows of `samples/completions`."""
        super().on_log(args, state, control, model=model, logs=logs, **kwargs)
        rows = self._run_log.completions
        if not rows or not state.is_world_process_zero:
            return
        columns, table = list(rows[0]), self._table
        if table is None or table.columns != columns or len(table.data) >= ROWS_IN_TABLE:
            self._table = self._wandb.Table(columns=columns, allow_mixed_types=True, log_mode="INCREMENTAL")
        for row in rows:
            self._table.add_data(*row.values())
        self._wandb.log({"samples/completions": self._table, "train/global_step": state.global_step})


def _has_account(settings: Any) -> bool:
    """Whether a key lies in the environment, in W&B's settings or in the netrc file. Asks nobody."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    path = os.environ.get("NETRC")
    places = [path] if path else [os.path.expanduser(name) for name in ("~/.netrc", "~/_netrc")]
    for place in places:
        try:
            if netrc.netrc(place).authenticators(urlsplit(settings.base_url).netloc):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
