"""A sampler that is not the policy that is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

from ._advice import HIGH, LOW, apart

GAP, RATIO = "rollout/sampler_gap/mean", "rollout/is_ratio/mean"
MOST = 0.05


@dataclass(kw_only=True)
class SamplerApart(Pattern):
    """The log-probs of the sampler and of the trainer differ."""

    name = "sampler_apart"
    meaning = "the sampler and the trainer are not the same policy"
    symptom = "Training is unstable with a separate engine, and stable without it"
    rule = f"`{GAP}` above {MOST}, or `{RATIO}` outside {LOW} to {HIGH}, in 5 rollouts in a row"
    covers = frozenset({GAP, RATIO})

    def find(self, history: History) -> Iterable[Finding]:
        step = apart(history, GAP, MOST, RATIO)
        if step is None:
            return
        text = (
            f"The log-probs of sampler and trainer differ by {history.mean(GAP):.2g} nats per token: other precision, "
            "temperature or old weights. Look at the engine, and correct for it."
        )
        yield Finding(self.name, step, text, tuple(self._overrides(history)), GAP)

    def _overrides(self, history: History) -> Iterable[str]:
        if (history.recipe.get("rollout") or {}).get("decode_dtype", "same") != "same":
            yield "rollout.decode_dtype=same"
        used = (history.recipe.get("rollout_correction") or {}).get("use", "none")
        yield f"rollout_correction.use={'masked' if used == 'truncated' else 'truncated'}"


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [SamplerApart]
