"""Pair losses that TRL does not have, and the scores that they compare: x = beta (score of chosen - score of rejected).

| loss | of x | largest gradient, where | gradient at x = -10 |
| --- | --- | --- | --- |
| sigmoid | -logsigmoid x | 1, x to -inf | 1.0 |
| sigmoid, smoothed by a | -(1 - a) logsigmoid x - a logsigmoid -x | 1 - a, x to -inf | 1 - a |
| fidelity | 1 - sqrt(sigmoid x) | .1925, sigmoid x = 1/3 | .0034 |
| savage | sigmoid(-x)^2 | .2963, sigmoid x = 1/3 | .00009 |
| symmetric | sigmoid -x | .25, x = 0 | .00005 |

The last three lie in (0, 1): a badly misordered pair, such as one with a wrong label, hardly moves the policy, whether the
label or the policy is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
# fmt: off
LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm", "fidelity", "savage", "symmetric",
]
# fmt: on
OWN = ("fidelity", "savage", "symmetric")
"""Loss types that TRL does not have. All others are TRL's, except the smoothed sigmoid."""
LEFT_OUT = {
    "aot": "it sorts the pairs of a micro-batch: the step would depend on how rows are split",
    "aot_unpaired": "it sorts the rows of a micro-batch: the step would depend on how rows are split",
    "sft": "it is averaged over the tokens of a micro-batch, and compares nothing",
}
"""Unsupported loss types of TRL, and why."""
OF_DIFFERENCES = frozenset({"sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", *OWN})
"""Losses of the difference of two scores, in which the unknown constant of an f-divergence cancels (arXiv:2309.16240)."""
SMOOTHED = {"sigmoid", "robust", "exo_pair"}
"""Losses that use the label smoothing."""
LARGEST_EXPONENT = 80.0


def score(log_ratios: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """Return f'(pi / pi_ref) without its constant, elementwise from log pi / pi_ref, which it equals for the reverse KL.

    f'(t) = log t, 1 - 1/t, log(2t / (t + 1)), (t^(alpha - 1) - 1) / (alpha - 1) (arXiv:2309.16240). Exponents are clamped at
    80, which stops the gradient there.
    """
    from torch.nn.functional import logsigmoid

    if divergence == "forward_kl":
        return -(-log_ratios).clamp(max=LARGEST_EXPONENT).expm1()
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratios)
    if divergence == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return ((alpha - 1) * log_ratios).clamp(max=LARGEST_EXPONENT).expm1() / (alpha - 1)
    return log_ratios


def smoothed(x: Tensor, a: float) -> Tensor:
    """Return -(1 - a) logsigmoid x - a logsigmoid -x: the label is wrong with probability a."""
    from torch.nn.functional import logsigmoid

    return -(1 - a) * logsigmoid(x) - a * logsigmoid(-x)


def fidelity(x: Tensor) -> Tensor:
    """Return 1 - sqrt(sigmoid x), without cancellation."""
    from torch.nn.functional import logsigmoid

    return -(logsigmoid(x) / 2).expm1()


def savage(x: Tensor) -> Tensor:
    """Return sigmoid(-x)^2."""
    return (-x).sigmoid() ** 2


def symmetric(x: Tensor) -> Tensor:
    """Return sigmoid -x: the losses of a pair and of the swapped pair add up to 1."""
    return (-x).sigmoid()


BOUNDED: dict[str, Callable[[Tensor], Tensor]] = {"fidelity": fidelity, "savage": savage, "symmetric": symmetric}


def own_loss(
    loss_type: LossType, beta: float, label_smoothing: float, divergence: Divergence, alpha: float
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the loss (B,) as a function of log pi / pi_ref of chosen and rejected, (B,) each; None if TRL has it."""
    if loss_type not in OWN and not (loss_type == "sigmoid" and label_smoothing > 0):
        return None

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        x = beta * (score(chosen, divergence, alpha) - score(rejected, divergence, alpha))
        return smoothed(x, label_smoothing) if loss_type == "sigmoid" else BOUNDED[loss_type](x)

    return loss


def reasons(loss_type: LossType, label_smoothing: float, divergence: Divergence, **given: float | None) -> list[str]:
    """Return errors for settings that would be ignored or fail, with the fix."""
    found = []
    if label_smoothing > 0 and loss_type not in SMOOTHED:
        found.append(f"label_smoothing must be 0 with loss_type={loss_type}, got {label_smoothing:g}. Set it to 0, or "
                     f"loss_type to {', '.join(sorted(SMOOTHED))}")  # fmt: skip
    if loss_type == "exo_pair" and label_smoothing == 0:
        found.append(
            "label_smoothing must be positive with loss_type=exo_pair. Set label_smoothing=0.001, as in arXiv:2402.00856"
        )
    if divergence != "reverse_kl" and loss_type not in OF_DIFFERENCES:
        found.append(
            f"f_divergence_type={divergence} leaves a constant in each score, which does not cancel in loss_type={loss_type}. "
            f"Set loss_type to {', '.join(sorted(OF_DIFFERENCES))}, or f_divergence_type=reverse_kl"
        )
    for name, reader in (("f_alpha_divergence_coef", "alpha_divergence"), ("discopop_tau", "discopop")):
        if given[name] is not None and reader not in (loss_type, divergence):
            key = "loss_type" if reader in get_args(LossType) else "f_divergence_type"
            found.append(f"{name}={given[name]:g} needs {key}={reader}. Remove it")
    return found
