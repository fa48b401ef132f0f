"""The chosen plugins as one algorithm: their joint needs, and reasons to refuse a combination."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import count
from typing import Any

from hf_rlhf.axes import (
    AXES,
    LISTS,
    AdvantageEstimator,
    Aggregation,
    Critic,
    Environment,
    Filter,
    KLPlacement,
    LossTerm,
    Plugin,
    PolicyLoss,
    PromptSampler,
    Reference,
    RewardSource,
    RolloutCorrection,
    RolloutEngine,
    TextTerm,
    TrainedCritic,
    UpdateRule,
    axis_of,
)
from hf_rlhf.config.old_logps import old_logps_problems, readers_before_update
from hf_rlhf.config.plugin_tree import walk
from hf_rlhf.config.references import EARLY, ReferenceUse, reference_problems, references_of
from hf_rlhf.config.sections import Update
from hf_rlhf.registry.host import get_host
from hf_rlhf.registry.settings_schema import at_path, callable_text

CORE_PROVIDES = frozenset(
    {
        *("old_logps", "groups", "group_ids", "greedy", "scores", "total_score", "completion_ids", "advantages"),
        *("selected", "entropy", "old_entropy", "sum_sq_probs", "full_distribution", "double_backward", "adapter"),
        *("router_logits", "routing_fractions"),
        "plain_weights",
    }
)
"""Quantities that the core computes on demand; the others of `FIXES` come from plugins. Whether the policy has
an adapter and plain weights is checked with the model's settings (`hf_rlhf.training.setup`)."""

NEEDS_OF_REWARDS = frozenset({"scores", "total_score", "greedy"})
"""Quantities that no algorithm without rewards has."""

FIXES = {
    "values": "set critic.use=value_head or critic.use=separate, or choose an estimator without values",
    "ref_logps": "set reference.use=frozen (or adapter_off with a LoRA policy)",
    **dict.fromkeys(
        ("turns", "states"), "set environment=[{use: second_chance}] or another, or choose an estimator without turns"
    ),
    "sampler_logps": "choose a rollout engine that reports log-probs, or set rollout_correction.use=none",
}


@dataclass(kw_only=True)
class Algorithm:
    """One choice per axis."""

    sampler: PromptSampler = field(default_factory=lambda: _default("sampler"))
    rollout: RolloutEngine
    environment: list[Environment] = field(default_factory=list)
    rewards: list[RewardSource] = field(default_factory=list)
    kl: list[KLPlacement] = field(default_factory=list)
    advantages: AdvantageEstimator
    critic: Critic
    policy_loss: PolicyLoss
    rollout_correction: RolloutCorrection
    reference: Reference
    optimizer: UpdateRule
    aggregation: Aggregation
    loss_terms: list[LossTerm] = field(default_factory=list)
    filters: list[Filter] = field(default_factory=list)
    update: Update = field(default_factory=Update)

    def plugins(self) -> Iterator[tuple[str, Plugin]]:
        """Yield every plugin with its dotted path in the recipe, nested ones included."""
        return walk(vars(self))

    @cached_property
    def needs(self) -> frozenset[str]:
        """Union of the plugins' needs."""
        return frozenset().union(*(self.needs_of(path, plugin) for path, plugin in self.plugins()))

    def needs_of(self, path: str, plugin: Plugin) -> frozenset[str]:
        """Return what the core must provide to the plugin at a path: `ref_logps`, the recipe's, not to a KL with its own."""
        axis, _, place = path.partition(".")
        own = axis == "kl" and self.kl[int(place.partition(".")[0])].reference is not None
        return plugin.needs - {"ref_logps"} if own else plugin.needs

    @cached_property
    def provides(self) -> frozenset[str]:
        """Quantities that the core and the plugins provide."""
        own = (
            plugin.provides
            for path, plugin in self.plugins()
            if path == "reference" or axis_of(type(plugin)) != "reference"
        )
        return CORE_PROVIDES.union(*own)

    @cached_property
    def references(self) -> dict[str, ReferenceUse]:
        """Key -> what is read of each distinct reference: the recipe's, and those of single KLs."""
        return references_of(self)

    @cached_property
    def samples_old_logps(self) -> bool:
        """True if log-probs reported by the rollout engine, in float32 or better, serve as the old ones."""
        if self.update.old_logps != "auto":
            return self.update.old_logps == "sampler"
        return bool(self.readers_of_old_logps) and self.rollout.exact_logps and not self.compares_sampler

    @cached_property
    def corrects_in_loss(self) -> bool:
        """True if the rollout correction compares the sampler with the update's own log-probs."""
        return self.update.old_logps == "lazy" and "sampler_logps" in self.rollout_correction.needs

    @cached_property
    def compares_sampler(self) -> bool:
        """True if the sampler's log-probs are compared with the policy's: something reads both, or the sampler has a copy of the
        weights."""
        if "sampler_logps" in self.needs:
            return True
        copied = not self.rollout.local and "sampler_logps" in self.rollout.provides
        return copied and self.update.old_logps != "sampler"

    @cached_property
    def skips_rows_without_advantage(self) -> bool:
        """True if a row whose advantages are all 0 contributes nothing to the gradient and to per-row metrics."""
        others = [term for term in self.loss_terms if not isinstance(term, TextTerm)]
        return (
            self.policy_loss.zero_without_advantage
            and not others
            and not isinstance(self.critic, TrainedCritic)
            and not self.references
            and type(self.optimizer).hold is UpdateRule.hold
        )

    @cached_property
    def loss_is_token_level(self) -> bool:
        """True if the loss of a token depends only on that token's numbers."""
        others = [term for term in self.loss_terms if not isinstance(term, TextTerm)]
        whole = [
            kl
            for _, kl in self.kl_in("loss")
            if not kl.token_level or kl.level != "token" or "full_distribution" in kl.estimator.needs
        ]
        by_row = self.policy_loss.needs & {"total_score", "group_ids"}
        others_of_row = (by_row, others, whole, "double_backward" in self.needs, self.corrects_in_loss)
        return self.policy_loss.token_level and not any(others_of_row)

    @property
    def loss_is_fused(self) -> bool:
        """True if the update differentiates the loss on the tiles of the language-model head."""
        return self.update.fused_loss == "auto" and self.loss_is_token_level

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.update.mini_batches * self.update.epochs

    def kl_in(self, place: str) -> list[tuple[str, KLPlacement]]:
        """Return (name in logs, placement) of the KLs that enter at `place`: reward, loss or advantage."""
        return [(title, kl) for title, kl in self.titled("kl") if place in kl.places]

    @cached_property
    def readers_of_old_logps(self) -> list[str]:
        """Readers of log-probs from before the first update; without any, the update's own forward computes them."""
        return [] if self.update.old_logps == "lazy" else readers_before_update(self)

    def kl_over_distributions(self, moment: str) -> list[tuple[str, KLPlacement]]:
        """Return (name in logs, placement) of KLs over whole distributions measured in the `rollout` or `update`."""
        return [
            (title, kl)
            for title, kl in self.titled("kl")
            if "full_distribution" in kl.estimator.needs
            and (bool(kl.places & EARLY) if moment == "rollout" else "loss" in kl.places or not kl.places & EARLY)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return every choice with all its settings, as in a resolved recipe."""
        chosen: dict[str, Any] = {}
        for axis in AXES:
            if hasattr(self, axis):
                value = getattr(self, axis)
                chosen[axis] = [_settings(p) for p in value] if axis in LISTS else _settings(value)
        return {**chosen, "update": asdict(self.update)}

    @property
    def completion_bounds(self) -> dict[str, int]:
        """Map settings to the tokens that they allow a completion, which is an answer or a whole episode."""
        episodes = {f"environment.{i}.max_tokens": e.max_tokens for i, e in enumerate(self.environment)}
        answer = getattr(self.rollout, "max_new_tokens", None)
        if answer is None or any(environment.when is None for environment in self.environment):
            return episodes
        return {"rollout.max_new_tokens": answer, **episodes}

    @property
    def agents(self) -> int:
        """Most rows of an episode: one for each agent."""
        return max((len(environment.agents) for environment in self.environment), default=1)

    def longest_turn(self, prompt: int | None) -> int | None:
        """Return the most tokens before a turn of `rollout.max_new_tokens`, in episodes after a prompt of so many tokens."""
        answer = getattr(self.rollout, "max_new_tokens", None)
        longest = max(self.completion_bounds.values(), default=0)
        return prompt if prompt is None or answer is None else prompt + max(0, longest - answer)

    def labels(self) -> list[str]:
        """Return the name of each reward source in logs and tables."""
        return [source.label or source.name for source in self.rewards]

    def titled(self, axis: str) -> list[tuple[str, Any]]:
        """Return (name in logs, plugin) for each plugin of a list axis; a second one of a kind is named `<name>_2`."""
        own = getattr(self, axis)
        return list(zip(_titles(own), own, strict=True))

    def extras(self, plugin: Plugin, available: dict[str, Any], positional: frozenset[str]) -> dict[str, Any]:
        """Return the keywords of a tensor function: one per name it needs beyond its positional arguments."""
        return {name: available[name] for name in sorted(plugin.needs - positional) if name in available}

    def problems(self) -> list[str]:
        """Return reasons why this combination cannot run or learn, each with its fix; empty when it can."""
        return list(self.each_problem())

    def each_problem(self) -> Iterator[str]:
        """Yield the reasons one by one."""
        yield from self._missing()
        yield from self._unused()
        yield from self._without_rewards()
        yield from self._counts()
        yield from old_logps_problems(self)
        yield from self._rewards()
        yield from reference_problems(self)
        yield from self._own_checks()

    def _missing(self) -> Iterator[str]:
        known = CORE_PROVIDES | FIXES.keys()
        for path, plugin in self.plugins():
            missing = sorted(self.needs_of(path, plugin) - self.provides)
            for fix in dict.fromkeys(FIXES[name] for name in missing if name in known):
                names = " and ".join(name for name in missing if FIXES.get(name) == fix)
                also = ", or leave the KL out with kl=[]" if names == "ref_logps" and path.startswith("kl") else ""
                yield f"{path}={plugin.name} needs {names} and nothing provides them: {fix}{also}"
            for name in missing:
                if name not in known:
                    yield (
                        f"{path}={plugin.name} needs {name!r}, which this version does not provide; "
                        f"it provides: {', '.join(sorted(known))}"
                    )

    def _unused(self) -> Iterator[str]:
        readers = [path for path, plugin in self.plugins() if "values" in plugin.needs]
        if readers and not any(path.split(".")[0] == "advantages" for path in readers):
            yield (
                f"{readers[0]} reads values and advantages={self.advantages.name} gives the critic no returns to learn: choose "
                "an estimator with a critic (gae, or baseline with baseline.use=critic)"
            )
        for name, axis in (("values", "critic"), ("ref_logps", "reference")):
            plugin = getattr(self, axis)
            if name in plugin.provides and name not in self.needs:
                yield f"{axis}={plugin.name} provides {name} and nothing reads them: set {axis}.use=none"

    def _without_rewards(self) -> Iterator[str]:
        if any(source.weight for source in self.rewards):
            return
        if not any(kl.places for kl in self.kl) and not (self.rewards and self.loss_terms):
            logged = "".join(f", as kl.{i}={kl.name} is only logged" for i, kl in enumerate(self.kl))
            reference = "" if "ref_logps" in self.provides else " and reference.use=frozen"
            without = "no reward has a weight" if self.rewards else "rewards is empty"
            yield (
                f"{without} and no KL enters the gradient{logged}: nothing to learn from. Set "
                f"rewards=[{{use: exact_match}}], or a KL in the loss, reward or advantage: kl=[{{use: in_loss}}]{reference}"
            )
        for path, plugin in self.plugins() if not self.rewards else ():
            if named := plugin.needs & NEEDS_OF_REWARDS:
                yield (
                    f"{path}={plugin.name} needs {', '.join(sorted(named))} and rewards is empty: choose another, or set "
                    "rewards=[{use: exact_match}]"
                )

    def _counts(self) -> Iterator[str]:
        rollout, update = self.rollout, self.update
        if rollout.num_generations < 2:
            for path, plugin in self.plugins():
                if "groups" in plugin.needs:
                    yield (
                        f"{path}={plugin.name} compares the completions of a prompt and rollout.num_generations is 1: "
                        "set rollout.num_generations=2 or more, or choose an estimator without groups (reinforce, "
                        "reward_to_go, gae)"
                    )
        if "double_backward" in self.needs and update.attention in ("packed", "flex"):
            yield (
                f"update.attention={update.attention} has no second derivative, which something needs: set it to auto or padded"
            )
        if rollout.prompts % update.mini_batches:
            fits = [n for n in range(1, rollout.prompts + 1) if rollout.prompts % n == 0]
            yield (
                f"rollout.prompts={rollout.prompts} does not split into update.mini_batches={update.mini_batches} equal "
                f"parts: choose mini_batches from {', '.join(map(str, fits))}, or change rollout.prompts"
            )
        for i, chosen in enumerate(self.filters):
            if chosen.resample and "advantages" in chosen.needs:
                yield (
                    f"filters.{i}={chosen.name}: resample {chosen.resample} has no meaning here: this filter runs when the "
                    f"advantages of the rollout are there, and no more prompts are drawn. Set filters.{i}.resample=0"
                )
        for i, kl in enumerate(self.kl):
            if "full_distribution" in kl.estimator.needs and kl.level == "sequence":
                yield (
                    f"kl.{i}.estimator={kl.estimator.name} reads the distributions of single tokens and has no sequence "
                    f"level: set kl.{i}.level=token, or choose another estimator"
                )
            if "entropy" in kl.estimator.needs and kl.places & {"reward", "advantage"}:
                yield (
                    f"kl.{i}.estimator={kl.estimator.name} needs entropy, which is computed in the update only: "
                    "set kl." + f"{i}.use=in_loss, or choose another estimator"
                )

    def _rewards(self) -> Iterator[str]:
        for i, source in enumerate(self.rewards):
            title = f"rewards.{i}={source.name}"
            yield from source.resource_errors()
            own = "reward_model" in source.provides  # not the policy
            if source.runs_model and (source.workers == "processes" or (source.workers == "ray" and not own)):
                yield (
                    f"{title} runs a model on this process's device, and rewards.{i}.workers={source.workers} would load it "
                    f"again in every worker: set rewards.{i}.workers=inline" + f", or rewards.{i}.workers=ray" * own
                )
            if source.clip is not None and not source.clip[0] < source.clip[1]:
                yield f"{title}: clip={list(source.clip)} is [lowest, highest] with lowest < highest"
            if source.when is not None and not source.when:
                yield (
                    f"{title}: when is empty; write a column and its value, for instance rewards.{i}.when={{task: math}}, or "
                    "leave it out"
                )
        labels = self.labels()
        for label in sorted({"total", "after_kl"} & set(labels)):
            yield f"a reward source is called {label!r}, which is the name of a sum in the logs: give it another label"
        for label in sorted({x for x in labels if labels.count(x) > 1}):
            yield f"{labels.count(label)} reward sources are called {label!r} in the logs: give each a `label` of its own"

    def _own_checks(self) -> Iterator[str]:
        for path, plugin in self.plugins():
            for problem in plugin.check(self):
                yield f"{path}: {at_path(path, plugin, problem)}"


def _default(axis: str) -> Any:
    """Return the plugin of a recipe that leaves an axis out, with its default settings."""
    return get_host().get(axis, str(AXES[axis].axis.default))()


def _settings(plugin: Plugin) -> dict[str, Any]:
    found: dict[str, Any] = {"use": plugin.name}
    for setting in fields(plugin):
        value = getattr(plugin, setting.name)
        if isinstance(value, Plugin):
            value = _settings(value)
        elif isinstance(value, list):
            value = [_settings(x) if isinstance(x, Plugin) else x for x in value]
        elif callable(value):
            value = callable_text(value)
        found[setting.name] = value
    return found


def places(algorithm: Algorithm) -> Iterator[tuple[str, str, Plugin]]:
    """Yield (prefix of its metrics, axis, plugin) of every plugin of an algorithm, nested ones included.

    Plugins of a list axis have the titles of `Algorithm.titled`. References of single KLs stand below `reference/`.
    """
    own: dict[str, list[Plugin]] = {axis: list(getattr(algorithm, axis)) if axis in LISTS else [] for axis in AXES}
    for path, plugin in algorithm.plugins():
        axis = axis_of(type(plugin))
        if axis not in LISTS or path.rpartition(".")[0] != axis:
            own[axis].append(plugin)
    for axis, plugins in own.items():
        for title, plugin in zip(_titles(plugins), plugins, strict=True):
            prefix = AXES[axis].axis.metric_prefix.replace("<label>", title)
            nested = axis == "reference" and plugin is not algorithm.reference
            yield f"{prefix}/{title}" if nested else prefix, axis, plugin


def _titles(plugins: Sequence[Plugin]) -> list[str]:
    """Return the unique name in logs of each plugin of one axis, in their order."""
    found: list[str] = []
    for plugin in plugins:
        label: str = (plugin.label if isinstance(plugin, RewardSource | KLPlacement) else None) or plugin.name
        numbered = (f"{label}_{n}" for n in count(2))
        found.append(label if label not in found else next(title for title in numbered if title not in found))
    return found
