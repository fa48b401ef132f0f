"""The Hub's part of a run: its repository, its pushes, its model card."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_rlhf.config.plan import plugin_files
from hf_rlhf.config.recipe_yaml import write_yaml
from hf_rlhf.metrics.model_card import Card
from hf_rlhf.runtime.hub_push import ANSWER_S, first_line, open_repository, upload

logger = logging.getLogger(__name__)

CARD = (
    "language",
    "license",
    "tags",
    "model_name",
    "finetuned_from",
    "tasks",
    "dataset_tags",
    "dataset",
    "dataset_args",
)
"""Arguments of Trainer's `create_model_card`, in their order."""
TASKS = {"TokenClassification": "token-classification", "SequenceClassification": "text-classification"}
"""End of the name of a model's class -> the Hub's name of what it does; of all others it is text-generation."""


def ask_for_repository(args: Any) -> None:
    """Create the repository on the Hub that `push_to_hub` needs, or raise `UserError`, before a model is loaded."""
    if args.push_to_hub and args.process_index == 0:
        open_repository(args)


class PushingTrainer(Trainer):
    """`transformers.Trainer` whose model card is that of the run, and whose pushes cost nothing of it when they fail."""

    record: dict[str, Any]
    summary: dict[str, Any] | None
    hub_model_id: Any
    pushed_to: str | None = None
    """Address of the repository on the Hub, once the run is there."""
    is_saved_for_push: bool = False
    """True while what has just been saved is pushed: it is not saved again."""
    _pushes_later: bool = False

    @contextmanager
    def pushes_later(self) -> Iterator[None]:
        """Do not push inside the block: Trainer pushes as soon as the weights are saved, before summary and card."""
        self._pushes_later = True
        try:
            yield
        finally:
            self._pushes_later = False

    def push_saved(self, asked: bool) -> None:
        """Push what has just been saved, if that was `asked` for and `push_to_hub` is set."""
        if asked and self.args.push_to_hub:
            self.is_saved_for_push = True
            try:
                self.push_to_hub("Model save", revision=self.args.hub_revision)
            finally:
                self.is_saved_for_push = False

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository on the Hub; `hub_model_id` stays None where the Hub does not answer."""
        if self.is_world_process_zero():
            self.hub_model_id = open_repository(self.args, token, private)
            self.push_in_progress = None

    def push_to_hub(self, commit_message: str | None = "End of training", *args: Any, **kwargs: Any) -> Any:
        """Save the model, write its card, and push the output folder without checkpoints; see Trainer's method.

        Raises `PushError` where the Hub does not take it: everything is then in the output folder.
        """
        if self._pushes_later:
            return None

        def push() -> Any:
            return super(PushingTrainer, self).push_to_hub(commit_message, *args, **kwargs)

        if not self.is_world_process_zero():
            return push()
        pushed = upload(self.args, self._folder, push)
        self.pushed_to = str(pushed.repo_url) if hasattr(pushed, "repo_url") else None  # a future has none
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint according to `hub_strategy`. Errors of the Hub are logged, and training continues."""
        try:
            if self.hub_model_id is not None or not self.is_world_process_zero():
                super()._push_from_checkpoint(checkpoint_folder)
        except Exception as error:
            logger.warning("push_to_hub: %s was not pushed: %s", checkpoint_folder, first_line(error))

    def _finish_current_push(self) -> None:
        """Wait a while for the pushes of checkpoints; what failed is logged."""
        pushes: Any = getattr(self, "push_in_progress", None)
        jobs = list(getattr(pushes, "jobs", ()))
        done, late = wait(jobs, timeout=ANSWER_S)
        failed = [first_line(error) for job in done if (error := job.exception()) is not None]
        for why in [*failed, *("the Hub does not answer" for _ in late)]:
            logger.warning("push_to_hub: a checkpoint was not pushed: %s", why)
        self.push_in_progress = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card of the run, `README.md`, with metadata given as to Trainer's method."""
        if not self.is_world_process_zero():
            return
        given = {**dict(zip(CARD, args, strict=False)), **kwargs}
        options = {name: given[name] for name in ("language", "license", "tags") if given.get(name)}
        options |= {"base_model": given["finetuned_from"]} if given.get("finetuned_from") else {}
        options |= {"datasets": given["dataset_tags"]} if given.get("dataset_tags") else {}
        recipe, offline = self.record["recipe"], self.record["algorithm"].get("trainer")
        card = Card(
            name=given.get("model_name") or (self.hub_model_id or self._folder.absolute().name).rpartition("/")[2],
            summary=self.summary or self.facts(),
            recipe=write_yaml(recipe) if recipe else None,
            history=self.state.log_history,
            adapter=(self._folder / "adapter_config.json").is_file(),
            trainer=offline["use"] if offline else None,
            task=self._task(),
            plugin_files=plugin_files(self.record["plan"]),
            options=options,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "README.md").write_text(str(card), encoding="utf-8")

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or "outputs")

    def facts(self) -> dict[str, Any]:
        """Return what is known of the run before it has ended."""
        run = self.record["run"]
        return {
            "recipe": self.record["name"],
            "model": run["model"]["path"],
            "dataset": run["dataset"]["path"],
            "rows": self.record["rows"],
            "before": self.record.get("before"),
            "plan": self.record["plan"],
            "versions": self.record["versions"],
        }

    def _task(self) -> str:
        """Return the Hub's name of what the model does."""
        model: Any = self.model
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        return next((task for end, task in TASKS.items() if end in name), "text-generation")
