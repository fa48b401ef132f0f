"""Checkpoints of a run: Trainer's own, our state beside it, and a manifest written last."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_rlhf.axes import UpdateRule
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.data.fingerprints import Contents, contents_of
from hf_rlhf.data.prompt_stream import PromptStream
from hf_rlhf.data.prompts import Prompts
from hf_rlhf.modeling.ema import FOLDER, PolicyEMA
from hf_rlhf.modeling.lora_merge import FOLDER as ADAPTER
from hf_rlhf.modeling.lora_merge import drop_other_form, merged, save_merged
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.sharding import WholeModel
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.checkpoint_state import load_state, load_tensors, plain, save_tensors
from hf_rlhf.runtime.errors import CheckpointError
from hf_rlhf.training import parallel
from hf_rlhf.training.collector import Collector
from hf_rlhf.training.device_phases import Phases
from hf_rlhf.training.rollout_buffer import Buffer
from hf_rlhf.training.run_trainer import RunTrainer
from hf_rlhf.training.sealing_trainer import weights_of
from hf_rlhf.training.sharded_models import model_is_whole

if TYPE_CHECKING:
    from hf_rlhf.training.setup import RunComponents

logger = logging.getLogger(__name__)


class SavingTrainer(RunTrainer):
    """A trainer whose checkpoints hold buffer, prompt stream, critic, reference, average and plugins, and resume exactly."""

    algorithm: Algorithm
    actor_critic: ActorCritic
    collector: Collector
    stream: PromptStream
    buffer: Buffer | None
    ema: PolicyEMA | None = None
    """The moving average of the policy, if the recipe keeps one."""
    whole: WholeModel | None = None
    """The twin of a sharded policy."""
    parts: RunComponents
    phases: Phases
    _bad_steps: int
    _tokens_logged: float
    _logged_at: float

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume from a checkpoint; see `RunTrainer.train`."""
        self._logged_at = time.perf_counter()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _begin_run(self) -> None:
        """Create a new run id, the first part of `Policy.version`, and begin at step 0."""
        super()._begin_run()
        self._weights_are_of(0)

    def _weights_are_of(self, step: int) -> None:
        """Set the policy's version: its weights are those after optimizer step number `step` of this run."""
        self.collector.policy.version = f"{self.run_id}:{step}"

    def check_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Return the manifest of a checkpoint that this run can resume from; raise `CheckpointError` for any other."""
        manifest = checkpoint_manifest.verify(folder)
        within = manifest["step"] % self.algorithm.steps_per_rollout != 0
        processes = self.args.world_size if within else None
        blends = self.phases.blends_away
        checkpoint_manifest.check_same_run(folder, manifest, self.record, processes, blends, self._allowed)
        return manifest

    def _contents(self) -> Contents:
        """Return the fingerprints of prompts, plugins and model; those of a stream are in its state."""
        model, train = self.parts.sections["model"], self.parts.train
        if model.path is None:
            policy: Any = self.model
            model = replace(model, path=policy.config.name_or_path or None)
        rows = {"dataset": {"of": "the dataset", "hash": train.content}} if isinstance(train, Prompts) else {}
        return rows | contents_of(self.algorithm.plugins(), model)

    def _sizes(self) -> dict[str, float]:
        own = type(self.algorithm.optimizer).hold is UpdateRule.hold
        return super()._sizes() | ({} if own else {"optimizer": 0.0})

    def _saved_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of policy, critic, moving reference and the policy's average, by name, whole ones one at a time."""
        return ((name, parallel.whole(x)) for name, x in self._kept_weights())

    def _kept_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from super()._saved_weights()
        for title, module in self._beside().items():
            yield from weights_of(title, module)
        if self.ema is not None:
            names = [name for name, p in self.actor_critic.policy.named_parameters() if p.requires_grad]
            yield from ((f"ema.{name}", x) for name, x in zip(names, self.ema.tensors(), strict=True))

    def _last_step(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * len(self.get_train_dataloader()))

    def _state(self) -> dict[str, Any]:
        used_up = self.state.global_step % self.algorithm.steps_per_rollout == 0
        plugins = {
            path: plain(plugin.state_dict(), f"{path}={plugin.name}: state_dict()")
            for path, plugin in self.algorithm.plugins()
            if plugin is not self.algorithm.sampler
        }
        return super()._state() | {
            "stream": plain(self.stream.state_dict(), f"sampler={self.algorithm.sampler.name}: state_dict()"),
            "buffer": None if used_up or self.buffer is None else self.buffer.state_dict(),
            "plugins": {path: state for path, state in plugins.items() if state},
            "meters": self.meters.state_dict(),
            "rewards": self.collector.normalizer.state_dict(),
            "tokens": self.collector.tokens,
            "bad_steps": self._bad_steps,
        }

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        """Load Trainer's state, and ours that `_save_checkpoint` wrote beside it."""
        super()._load_optimizer_and_scheduler(checkpoint_folder)
        if checkpoint_folder is None:
            return
        assert self.optimizer is not None
        parallel.load_optimizer_shards(self.optimizer)
        rank = min(self.args.process_index, checkpoint_manifest.read_manifest(Path(checkpoint_folder))["processes"] - 1)
        state = load_state(Path(checkpoint_folder), rank)
        self._bad_steps, self._unlogged = state["bad_steps"], state.get("loss")
        try:
            self.stream.load_state_dict(state["stream"], same="dataset" not in self._allowed)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        self.buffer = None if state["buffer"] is None else Buffer.from_state_dict(state["buffer"], self.args.device)
        for path, plugin in self.algorithm.plugins():
            if path in state["plugins"]:
                plugin.load_state_dict(state["plugins"][path])
        self.meters.load_state_dict(state["meters"])
        self.collector.normalizer.load_state_dict(state["rewards"])
        self.collector.tokens = self._tokens_logged = state["tokens"]

    def _beside(self) -> dict[str, nn.Module]:
        """Return the modules that a checkpoint holds beside the policy: the critic, and references that move, by label."""
        moving = {label: own for label, (_, own) in self.collector.forwards.references.moving().items()}
        modules = {"critic": self.actor_critic.critic, **moving}
        return {name: module for name, module in modules.items() if module is not None}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the policy as plain transformers weights or an adapter; critic, a moving reference and the policy's average
        beside it."""
        folder = Path(output_dir or self.output_dir)
        policy: Any = self.model
        whole = not self._saves_checkpoint and bool(self.parts.sections["model"].save_merged)
        keep = self.whole is None or self.args.should_save
        weights = parallel.state_dict(policy, keep)  # on every process, as all that follows
        if whole and self.args.should_save:
            policy.save_pretrained(folder / ADAPTER, state_dict=weights)  # before the merge, which may fail
            self.model = merged(policy, weights)
            try:
                super()._save(output_dir)
            finally:
                self.model = policy
        elif keep:
            super()._save(output_dir, weights)
        for name, module in self._beside().items():
            weights = parallel.state_dict(module, keep)
            if self.args.should_save:
                save_tensors(folder / name, weights)
        if self.ema is not None:
            save = save_merged if whole else type(policy).save_pretrained
            with self.ema.as_policy(policy, exact=True):
                weights = parallel.state_dict(policy, keep)
                if self.args.should_save:
                    save(policy, folder / FOLDER, state_dict=weights)
        if not self.args.should_save:
            return
        if self.ema is not None and self.processing_class is not None:
            self.processing_class.save_pretrained(folder / FOLDER)
        if hasattr(policy, "peft_config") and not self._saves_checkpoint:
            for written in (folder, folder / FOLDER):
                drop_other_form(written, whole)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the policy's weights by Trainer, and what is saved beside them."""
        with model_is_whole(self):
            policy: Any = self.model
            adapters = set(getattr(policy, "peft_config", ()))
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            for name in set(getattr(policy, "peft_config", ())) - adapters:
                policy.delete_adapter(name)  # Trainer loads the average's folder as one more adapter
        self._load_beside(Path(resume_from_checkpoint))
        for difference in self.algorithm.rollout.differences(self.algorithm):
            logger.warning("%s", difference)

    def _load_best_model(self) -> None:
        """Load the best policy by Trainer, and what was saved beside it."""
        with model_is_whole(self):
            super()._load_best_model()
        if self.state.best_model_checkpoint:
            self._load_beside(Path(self.state.best_model_checkpoint))

    def _load_beside(self, folder: Path) -> None:
        """Load what a checkpoint holds beside the policy, and take on its version."""
        self._weights_are_of(checkpoint_manifest.read_manifest(folder)["step"])
        for name, module in self._beside().items():
            parallel.load_state_dict(module, load_tensors(folder / name))
        if self.ema is not None:
            with self.ema.as_policy(self.model, exact=True), model_is_whole(self):
                super()._load_from_checkpoint(str(folder / FOLDER))
