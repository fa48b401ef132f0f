"""A verifier that never finds a right answer, or none at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Finding, History, Pattern

ROLLOUTS, FEW = 10, 0.05


@dataclass(kw_only=True)
class NoAnswer(Pattern):
    """A verifier gives 0 to every completion of many rollouts."""

    name = "no_answer"
    meaning = "a verifier never finds an answer, or never a right one"
    symptom = "The accuracy is 0 from the start"
    rule = (
        f"`reward/<label>/mean` of a verifier is 0 in {ROLLOUTS} rollouts in a row; it finds no answer where "
        f"`reward/<label>/answered_frac` is below {FEW} in them"
    )

    def find(self, history: History) -> Iterable[Finding]:
        for label, source in history.sources.items():
            name = f"reward/{label}/mean"
            step = history.since(name, lambda score: score == 0, ROLLOUTS) if source.verifier else None
            if step is None:
                continue
            answered = history.mean(f"reward/{label}/answered_frac", ROLLOUTS)
            if answered < FEW:
                text = (
                    f"The verifier {label} finds an answer in {answered:.0%} of the completions. Ask for the form that it reads, "
                    "such as \\boxed{...}, leave room for it, or tell it where answers are."
                )
            else:
                text = (
                    f"The verifier {label} has called no completion right in {ROLLOUTS} rollouts or more. Compare completions "
                    "with the reference answers: other form, wrong column, or a task beyond the policy."
                )
            overrides = self._overrides(history, source.place, answered)
            if not overrides:
                text += " There is no override to type: the prompts already have a template of yours."
            yield Finding(self.name, step, text, overrides, name)

    def _overrides(self, history: History, place: int, answered: float) -> tuple[str, ...]:
        """Return what asks for an answer, or reads one in any form."""
        limit = (history.recipe.get("rollout") or {}).get("max_new_tokens")
        longer = (f"rollout.max_new_tokens={2 * limit}",) if limit and answered < FEW else ()
        settings = (history.recipe.get("rewards") or ())[place]
        if settings.get("column") and settings["use"] == "exact_match":
            return (*longer, f"rewards.{place}={{use: math_answer, column: {settings['column']}}}")
        column = (history.recipe.get("dataset") or {}).get("prompt", "prompt")
        ask = f"dataset.prompt_template={{{column}}} Give the final answer as \\boxed{{{{...}}}}."
        return (*longer, *(() if history.recipe.get("dataset", {}).get("prompt_template") else (ask,)))


@hookimpl
def doctor() -> list[type[Pattern]]:
    return [NoAnswer]
