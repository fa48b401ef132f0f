"""Load balancing of a mixture of experts (Switch Transformers, arXiv:2101.03961, equation 4), over a whole optimizer step.

On by itself where the model's configuration has a coefficient, which training on log-probs would drop. f_i is the share of
the step's tokens that go to expert i, over every micro-batch and process, counted in the forward before the updates and
without gradient; the term is then linear in tokens, so that any split gives one gradient. transformers multiplies the means
of one micro-batch instead, and pools the layers (`pool: model`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, LossTerm, NonNegative

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(kw_only=True)
class RouterBalance(LossTerm):
    """coef E sum_i f_i P_i of each layer, summed over layers: P_i is the mean router probability of expert i of E."""

    name = "router_balance"
    needs = frozenset({"router_logits", "routing_fractions"})

    coef: NonNegative | None = None
    """Coefficient; null: that of the model's configuration, 0 if it has none. At 0 routing fractions are logged alone."""
    pool: Literal["layer", "model"] = "layer"
    """`layer`: a term for each layer; `model`: one term of f and P averaged over the layers, as transformers has it."""

    def __post_init__(self) -> None:
        self._coef = self.coef or 0.0

    @staticmethod
    def coefficient(config: Any) -> float:
        """Return the coefficient in a model's configuration, 0 if there is none."""
        text = config.get_text_config()
        return next((float(x) for name in COEFFICIENTS if (x := getattr(text, name, None))), 0.0)

    def in_words(self) -> str:
        return (
            f"load balancing of the experts ({'coefficient of the model' if self.coef is None else f'{self.coef:g}'})"
        )

    def setup(self, context: Context) -> None:
        if self.coef is None and context.policy is not None:
            self._coef = self.coefficient(context.policy.config)

    def model_remarks(self, config: PreTrainedConfig) -> Iterable[str]:
        own = self.coefficient(config)
        if self.coef is None and own:
            yield (
                f"the model's configuration balances its experts with coefficient {own:g}, which training on log-probs would "
                "drop: this term keeps it. loss_terms=[{use: router_balance, coef: 0}] logs routing fractions alone"
            )
        elif not (own if self.coef is None else self.coef):
            yield "no coefficient, in the recipe or in the model's configuration: routing fractions are logged alone"

    # fields named in `needs` arrive as keywords, which the base class cannot list
    def __call__(  # type: ignore[override]
        self, logps: Tensor, mask: Tensor, *, router_logits: Tensor, routing_fractions: Tensor
    ) -> Tensor:
        probabilities, fractions = router_logits.to(logps.dtype).softmax(-1), routing_fractions
        if self.pool == "model":
            probabilities, fractions = probabilities.mean(2, keepdim=True), fractions.mean(2, keepdim=True)
        balance = router_logits.size(-1) * (fractions * probabilities).sum((2, 3))
        return self._coef * balance * mask


@hookimpl
def loss_terms() -> list[type[LossTerm]]:
    return [RouterBalance]
