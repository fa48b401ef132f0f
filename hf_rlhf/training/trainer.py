"""The reinforcement-learning step on `transformers.Trainer`.

Each item of the dataloader stands for one optimizer step. The first item of a rollout makes the collector fill the buffer;
each item then takes the micro-batches of its step from it. Everything after the loss is Trainer's own.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from hf_rlhf.axes import TextTerm, TrainedCritic, check_output
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.plan import Plan
from hf_rlhf.config.recipe import Recipe, load_recipe
from hf_rlhf.config.sharding import sharding_of
from hf_rlhf.config.training_arguments import check_accelerator
from hf_rlhf.contract.outputs import noted
from hf_rlhf.data.prompt_stream import PromptStream
from hf_rlhf.metrics import aliased, entropy_is_exact, metrics_of
from hf_rlhf.metrics.aggregator import HEALTH, MetricAggregator
from hf_rlhf.metrics.console import show_in_terminal
from hf_rlhf.metrics.doctor_callback import DoctorCallback
from hf_rlhf.metrics.jsonl_log import RunLog
from hf_rlhf.metrics.live_view import SHOWN
from hf_rlhf.metrics.notebook import notebook_view, show_in_notebook
from hf_rlhf.metrics.trackers import install, prepare
from hf_rlhf.modeling.ema import PolicyEMA
from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.errors import CheckpointError
from hf_rlhf.scoring.normalization import RewardNormalizer
from hf_rlhf.training.callbacks import StepCallback
from hf_rlhf.training.checkpointing import SavingTrainer
from hf_rlhf.training.collector import Collector
from hf_rlhf.training.device_phases import Phases
from hf_rlhf.training.evaluation import Evaluated, evaluate, row_types
from hf_rlhf.training.held_out_rows import kept_rows
from hf_rlhf.training.logprobs import Forwards
from hf_rlhf.training.losses import derivative, policy_terms, text_term, value_term
from hf_rlhf.training.micro_batches import Batching
from hf_rlhf.training.parallel import Parallel
from hf_rlhf.training.parameter_groups import check_given, critic_groups
from hf_rlhf.training.plugin_setup import close_plugins
from hf_rlhf.training.recording import ALL, Recorder
from hf_rlhf.training.references import References
from hf_rlhf.training.rollout_buffer import Buffer, micro_batches_of_step
from hf_rlhf.training.setup import default_arguments, setup_run
from hf_rlhf.training.sharded_models import shard_models
from hf_rlhf.training.update_rule import step_of


class RLHFTrainer(SavingTrainer):
    """`transformers.Trainer` on scored rollouts, with the recipe's loss.

    Args:
        model: a causal language model, or its folder or Hub name; the recipe's `model.path` when left out.
        algorithm: a recipe's name or path, a `Recipe`, or an `Algorithm`.
        args: TrainingArguments, taken as they are; `recipe.training_arguments()` when left out. docs/training_arguments.md
            lists which are honoured, forced and refused.
        train_dataset: a `datasets.Dataset` or a list of dicts with a prompt column.
        eval_dataset: the same, or a dict of several; so is what `evaluate` takes.
        processing_class: the tokenizer; the model's own when left out.
        callbacks: as Trainer's.
        peft_config: a peft configuration; the policy then trains its adapter alone.
        trust_remote_code: run code that comes with a model from the Hub.
        on_plan: called with the plan once everything is checked, before the model loads.

    Raises `ValueError` before the model loads where the combination or an argument is refused.
    """

    loss_is_scaled_for_ga = True  # weights span the whole optimizer step; nothing is left to divide

    @doing("loading the model")
    def __init__(
        self,
        model: Any = None,
        algorithm: Algorithm | Recipe | str = "grpo",
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        trust_remote_code: bool = False,
        on_plan: Callable[[Plan], None] | None = None,
    ):
        self.started, view, quiet = time.perf_counter(), notebook_view(), args is not None and args.disable_tqdm
        algorithm = load_recipe(algorithm) if isinstance(algorithm, str) else algorithm
        args = default_arguments(algorithm) if args is None else args
        parts = setup_run(
            *(model, algorithm, args, train_dataset, eval_dataset, processing_class, peft_config),
            trust_remote_code=trust_remote_code,
            on_plan=on_plan,
        )
        self.parts, self.algorithm, self.plan, self.record = parts, parts.algorithm, parts.plan, parts.record
        self.meters = MetricAggregator(args.device)
        self.buffer: Buffer | None = None
        self._optimizer_given = optimizers[0] is not None
        declared = metrics_of(self.algorithm, parts.logging_settings)
        self.doctor = DoctorCallback(parts.record["recipe"] or self.algorithm.as_dict(), declared)
        self.run_log = RunLog(args.output_dir or "outputs", parts.record, parts.logging_settings.completions == ALL)
        trainer = weakref.proxy(self)
        around_step = StepCallback(lambda: trainer.phases.stepping(), lambda step: trainer._after_step(step))
        prepare(args)
        super().__init__(
            parts.model,
            args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=parts.train,
            eval_dataset=parts.evaluation,
            processing_class=parts.tokenizer,
            callbacks=[around_step, *(callbacks or []), self.run_log, self.doctor],
            optimizers=optimizers,
        )
        check_accelerator(self.accelerator, self.args)
        self.parallel = Parallel(self.accelerator, sharding_of(self.args))
        self.end_tracking = install(self.callback_handler, self.args, self.run_log, self.doctor, parts.record)
        self.actor_critic, references = parts.build(self.model, self.args)
        self.whole = shard_models(self.parallel, self.algorithm, self.actor_critic, references)
        self.ema = PolicyEMA(self.actor_critic.policy, decay) if (decay := self.algorithm.update.ema) else None
        held = (self.actor_critic, references.models, lambda: trainer.optimizer, self.ema)
        self.phases = Phases.of(self.algorithm, *held, self.meters)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order: Any = {"shuffle": parts.dataset_settings.shuffle, "sampler": self.algorithm.sampler}
        self.stream = PromptStream(parts.train, seed=seed, **order)
        self._finalizer = weakref.finalize(self, close_plugins, self.algorithm)
        self.collector = self._collector(references)
        self._begin_run()
        self._health = HEALTH if self.algorithm.rewards else {x: 0.0 for x in HEALTH if "/reward_" not in x}
        self._bad_steps, self._tokens_logged, self._logged_at = 0, 0.0, time.perf_counter()
        self._step_sums: set[str] = set()  # the terms of the loss, each a sum over one optimizer step
        show_in_notebook(self, view)
        show_in_terminal(self, SHOWN, quiet or view is not None)

    def _collector(self, references: References) -> Collector:
        """Build the collector of rollouts, and set up every plugin."""
        policy = self.parts.policy(self.model, self.args, self.whole)
        args, logged, autocast = self.args, self.parts.logging_settings.completions, self.accelerator.autocast
        forwards = Forwards(
            algorithm=self.algorithm,
            actor_critic=self.actor_critic,
            references=references,
            accelerator=self.accelerator,
            batching=Batching.of(self.algorithm, self.actor_critic, args, policy.pad_token_id, autocast()),
            phases=self.phases,
            parallel=self.parallel,
        )
        with policy.gathered():
            scorer = self.parts.set_up(policy.model, args, autocast())
        self._scorer_finalizer = weakref.finalize(self, scorer.close)
        return Collector(
            algorithm=self.algorithm,
            policy=policy,
            actor_critic=self.actor_critic,
            forwards=forwards,
            scorer=scorer,
            normalizer=RewardNormalizer(list(scorer.sources.items())),
            accelerator=self.accelerator,
            stream=self.stream,
            meters=self.meters,
            recorder=Recorder(self.algorithm, policy.tokenizer, self.accelerator, args.seed, logged),
            seed=args.seed,
        )

    # Rollouts become slots

    def get_train_dataloader(self) -> DataLoader:
        """Return one item per optimizer step of an epoch. Prompts come from the stream, whose position is saved."""
        per_rollout, prompts = self.algorithm.steps_per_rollout, self.algorithm.rollout.prompts
        rows = self.stream.rows
        if rows is None and self.args.max_steps <= 0:
            raise ValueError("a streamed dataset has no length. Set training.max_steps")
        if rows is not None and rows < prompts:
            raise ValueError(
                f"rollout.prompts must be at most the {rows} rows of the dataset, got {prompts}. Lower rollout.prompts"
            )
        steps = self.args.max_steps if rows is None else max(1, rows // prompts) * per_rollout
        return DataLoader(range(steps), batch_size=1, collate_fn=list)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """Return the micro-batches of the next optimizer step; collects a new rollout when the last one is used up."""
        next(epoch_iterator)
        index, position = divmod(self.state.global_step, self.algorithm.steps_per_rollout)
        if position == 0:
            self.phases.sampling()
            self.collector.recorder.begin(index, self.state.max_steps)
            sampled = self.collector.collect(index)
            self.buffer = self.collector.deal(sampled)
            self.collector.recorder.keep(sampled, self.state.global_step, self.run_log, self.buffer)
        if self.buffer is None or self.buffer.index != index:
            raise CheckpointError(f"step {self.state.global_step} is in the middle of a rollout that was not saved")
        chosen = (position, self.state.global_step, self.algorithm, self.args, self.collector.forwards.batching)
        return [micro_batches_of_step(self.buffer, *chosen, self.parallel.most)], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run Trainer's own step on each micro-batch; processes average gradients at the last one."""
        loss = torch.zeros((), device=self.args.device)
        self.phases.updating()
        with self.meters.time("update"):
            for i, micro in enumerate(inputs):
                with self.parallel.micro_batch(model, last=i == len(inputs) - 1):
                    loss += super().training_step(model, micro).to(loss.dtype)
                micro["batch"].release()
        self.parallel.reshard()
        if inputs:
            self._step_sums |= {
                f"plugin/{title}/loss"
                for title, term in self.algorithm.titled("loss_terms")
                if isinstance(term, TextTerm)
            }
        for name in self._step_sums:
            self.meters.add(name, 0.0, 1 / self.args.world_size)
        self._step_sums.clear()
        loss = self._guard(loss)
        self.run_log.sample = self.collector.recorder.take() or self.run_log.sample
        self.algorithm.optimizer.hold(step_of(self, inputs))
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the recipe's loss of one micro-batch, times the number of processes, as gradients are averaged."""
        sums = self._terms(model, inputs, self.meters)
        for name, x in sums.items():
            self.meters.add(name, x, 0.0)
        self._step_sums |= set(sums)
        loss: Any = sum(sums.values()) * self.args.world_size
        return loss * torch.where(loss.isfinite(), 1.0, torch.nan)  # its gradient may be finite where it is not

    def _terms(
        self, model: nn.Module, inputs: dict[str, Any], meters: MetricAggregator, with_critic: bool = True
    ) -> dict[str, Tensor]:
        """Return the terms of the loss of one micro-batch, each this process's share of the step's."""
        a = self.algorithm
        if "text_term" in inputs:
            return text_term(a, model(inputs["batch"], entropy="entropy" in a.needs, temperature=1.0), inputs)
        critic = a.critic if with_critic and isinstance(a.critic, TrainedCritic) else None
        with self.accelerator.autocast():
            measures = self.collector.forwards.references.in_update(inputs)
        fused = torch.is_grad_enabled() and a.loss_is_fused
        new = model(
            inputs["batch"],
            entropy=entropy_is_exact(a, self.parts.logging_settings),
            values=critic is not None,
            router_logits="router_logits" in a.needs,
            measures=measures or None,
            derivative=derivative(a, inputs) if fused else None,
        )
        self.collector.recorder.note(inputs, new["logps"])
        gradient = new.pop("loss", None)  # a zero with the gradient of all that follows
        sums = policy_terms(a, new, inputs, meters)
        if gradient is not None:
            sums["policy/loss"] = sums["policy/loss"] + gradient
        if critic is not None:
            sums |= value_term(critic, new["values"], inputs, meters)
        return sums

    def _after_step(self, step: int) -> None:
        """Move references and the average, and collect what the update rule measured."""
        self._weights_are_of(step)
        if self.collector.forwards.references.move(self.model, step):
            self.phases.moved()
        if self.ema is not None:
            self.ema.update()
        for name, x in self.algorithm.optimizer.take_logs().items():
            self.meters.put(f"optimizer/{name}", x)

    def _guard(self, loss: Tensor) -> Tensor:
        """Skip a step whose gradient is not finite, and update only the critic during its warm-up."""
        critic = self.algorithm.critic
        if isinstance(critic, TrainedCritic) and self.state.global_step < critic.warmup_steps:
            for parameter in self.actor_critic.policy.parameters():
                parameter.grad = None
        finite = self.parallel.gradients_are_finite(self.actor_critic)
        self.meters.put("health/nonfinite_step", 0 if finite else 1)
        self._bad_steps = 0 if finite else self._bad_steps + 1
        said = noted((plugin for _, plugin in self.algorithm.plugins()), read_again=not finite)
        if finite:
            return loss
        self._check_weights()
        if self._bad_steps >= 3:
            raise FloatingPointError(
                f"the gradient was not finite in {self._bad_steps} consecutive optimizer steps, the last at step "
                f"{self.state.global_step}. {said or 'Lower the learning rate, or look at policy/approx_kl in metrics.jsonl'}"
            )
        self.actor_critic.zero_grad()
        return torch.zeros_like(loss)

    # The module that is trained, and its optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Wrap policy and critic as one module, so that both forwards run inside what synchronizes gradients."""
        if not training or model is not self.model:
            return model
        return self.parallel.wrap(self.actor_critic)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer (or the recipe's update rule), with the critic in parameter groups of its own."""
        groups = critic_groups(
            self.actor_critic.critic, self.algorithm.critic, self.args, self.get_decay_parameter_names
        )
        if self.optimizer is not None:
            if self._optimizer_given and self.algorithm.optimizer.build(self.actor_critic, groups) is not None:
                raise ValueError(
                    f"optimizers: the recipe's optimizer={self.algorithm.optimizer.name} creates its own. Leave optimizers "
                    "out, or set optimizer.use=trainer"
                )
            check_given(self.optimizer, groups)
        else:
            rule = self.algorithm.optimizer
            built = rule.build(self.actor_critic, groups)
            self.optimizer = check_output("optimizer", rule, built, None, method="build")
            if self.optimizer is None:
                super().create_optimizer(model)
                for group in groups:
                    self.optimizer.add_param_group(group)  # type: ignore[attr-defined]
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip policy and critic each by its own norm: a large value error must not shrink the policy's step."""
        return self._norms(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the policy's norm, also without clipping."""
        return super()._get_grad_norm(model, self._norms(float("inf")) if grad_norm is None else grad_norm)

    def _norms(self, limit: float) -> Any:
        if self.actor_critic.critic is not None:
            norm = self.parallel.clip_grad_norm(self.actor_critic.critic, limit)
            self.meters.put("value/grad_norm", float(norm))
        return self.parallel.clip_grad_norm(self.actor_critic.policy, limit)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the rows per optimizer step over all processes."""
        rollout = self.algorithm.rollout
        return rollout.prompts * rollout.num_generations // self.algorithm.update.mini_batches

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 6 x parameters x tokens over the micro-batches of a step."""
        tokens = sum(micro["batch"].positions for micro in inputs)
        model: Any = self.model
        return 6 * tokens * model.num_parameters(exclude_embeddings=True)

    # Log and evaluate

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last entry to Trainer's own."""
        if "loss" in logs:
            logs |= {"policy/grad_norm": logs["grad_norm"], **self._health, **self.meters.read(self.accelerator)}
            now, tokens = time.perf_counter(), self.collector.tokens
            if tokens > self._tokens_logged:
                logs["perf/tokens_per_s"] = (tokens - self._tokens_logged) / (now - self._logged_at)
                self._tokens_logged, self._logged_at = tokens, now
        logs = {**logs, **aliased(logs, self.meters.items, self.algorithm, self.parts.logging_settings)}
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the prompts of the evaluation dataset."""
        own: Any = self.eval_dataset
        self._evaluates_own = eval_dataset is None or eval_dataset is own or isinstance(eval_dataset, str)
        source = own if eval_dataset is None else own[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if source is None:
            raise ValueError("evaluate needs an eval_dataset. Pass one to the trainer or to evaluate")
        chosen = list(islice(self.parts.as_prompts(source), self.parts.evaluation_settings.prompts))
        return DataLoader(chosen, batch_size=1, collate_fn=list)  # type: ignore[arg-type]

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the prompts that `predict` reads, as for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Roll out held-out prompts and report rewards and, for verifiers, accuracy, pass@k and maj@k."""
        prompts: Any = dataloader.dataset
        settings = self.parts.evaluation_settings
        self.phases.sampling()
        found = self._evaluated(prompts, metric_key_prefix)
        metrics, self.samples, self.intervals = dict(found.metrics), found.samples, dict(found.intervals)
        if settings.ema and self.ema is not None:
            with self.collector.policy.averaged(self.ema):
                averaged = self._evaluated(prompts, f"{metric_key_prefix}_ema")
            metrics |= {f"ema/{name}": x for name, x in averaged.metrics.items()}
            self.intervals |= {f"ema/{name}": x for name, x in averaged.intervals.items()}
        named = {f"{metric_key_prefix}_{name}": x for name, x in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=len(prompts))  # type: ignore[arg-type]

    def _evaluated(self, prompts: Any, prefix: str) -> Evaluated:
        """Evaluate, and keep the rows of the run's own evaluation datasets."""
        settings = self.parts.evaluation_settings
        if not self._evaluates_own:
            return evaluate(self.collector, prompts, settings)
        path = self.run_log.evaluation(self.state.global_step, prefix)
        types = row_types(self.algorithm)
        with kept_rows(path, types, self.accelerator, settings.num_generations) as keep:
            return evaluate(self.collector, prompts, settings, keep)

    def close(self) -> None:
        """Stop what the plugins started. Also called when the trainer is garbage-collected and at exit."""
        try:
            super().close()
        finally:
            self._scorer_finalizer()
            self._finalizer()
