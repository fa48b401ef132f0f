"""Distillation by enumeration: what each form of it descends, how biased and how noisy it is, and what the top k leave out.

The reference is the teacher and there is no reward. Each form is a KL with an estimator; its expected gradient is compared
with that of the reverse KL of completions, KL(pi || ref), which a reward of -k1 has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.config.recipe import load_plugin
from hf_rlhf.lab.choices import in_world
from hf_rlhf.lab.study import Lab
from hf_rlhf.lab.world import Policies, World

BETA = 1.0
TOKENS, LONGEST = 8, 2
"""Tokens, and maximum tokens of a completion, of the world in which the top k are compared."""
FORMS: dict[str, dict[str, Any]] = {
    "k1 as the reward": {"use": "in_reward", "estimator": "k1"},
    "k1 of the row as the advantage": {"use": "in_advantage", "estimator": "k1", "level": "sequence"},
    "k1 as the advantage (opd)": {"use": "in_advantage", "estimator": "k1"},
    "k2 in the loss (grpo_opd)": {"use": "in_loss", "estimator": "k2"},
    "k3 in the loss": {"use": "in_loss", "estimator": "k3"},
    "exact in the loss (opd_exact, sdft)": {"use": "in_loss", "estimator": "exact"},
    "jsd in the loss (gkd)": {"use": "in_loss", "estimator": {"use": "jsd", "normalize": True}},
    "forward in the loss": {"use": "in_loss", "estimator": "forward"},
}
"""Form -> its KL."""
TOP = (1, 2, 4)


@dataclass(frozen=True)
class Form:
    """Expected gradient of one form of distillation."""

    title: str
    objective: str
    """Divergence whose descent it is."""
    cosine: float
    """Cosine of the descent with that of KL(pi || ref)."""
    bias: float
    """|expected gradient - grad KL(pi || ref)| / |grad KL(pi || ref)|."""
    forward: float
    """Cosine of the descent with that of KL(ref || pi)."""
    variance: float
    """Trace of the covariance of a completion's gradient, over the squared norm of grad KL(pi || ref)."""


@dataclass(frozen=True)
class Gap:
    """A divergence over the reference's top k, and its distance to the whole."""

    estimator: str
    top_k: int
    value: float
    """Nats per completion, from the studied policy."""
    gap: float
    """The same over the whole vocabulary, minus `value`."""
    cosine: float
    """Cosine of its gradient with that over the whole vocabulary, the visited states held fixed."""


def forms(world: World) -> Iterator[Form]:
    """Yield every form of distillation in a world without rewards."""
    lab = Lab(world=world, beta=BETA)
    reverse, forward = (
        next(x.gradient for x in lab.objectives.divergences if x.name == name)[0]
        for name in ("KL(pi||ref)", "KL(ref||pi)")
    )
    for title, settings in FORMS.items():
        kl = load_plugin("kl", settings["use"], beta=BETA, **{k: v for k, v in settings.items() if k != "use"})
        algorithm = in_world(world, advantages=load_plugin("advantages", "reinforce"), kl=[kl])
        row, descent = lab.study(algorithm), -lab.gradients(algorithm).mean[0]
        assert row.objective is not None
        assert row.variance is not None
        yield Form(
            title=title,
            objective=row.objective.removeprefix("- beta "),
            cosine=_cosine(descent, reverse),
            bias=float((descent - reverse).norm() / reverse.norm()),
            forward=_cosine(descent, forward),
            variance=row.variance / float(reverse.norm()) ** 2,
        )


def gaps(world: World, top: Sequence[int] = TOP) -> Iterator[Gap]:
    """Yield what the top k leave out of each divergence of whole distributions."""
    for name in ("exact", "forward", "jsd"):
        whole, its_gradient = _measured(world, name, None)
        for k in top:
            value, gradient = _measured(world, name, k)
            yield Gap(name, k, value, whole - value, _cosine(gradient, its_gradient))


def _measured(world: World, estimator: str, top_k: int | None) -> tuple[float, Tensor]:
    """Return the mean per completion of a divergence, and its gradient (S, V) with the visited states held fixed."""
    leaf = world.table(0).clone().requires_grad_()
    policy = Policies(world, leaf[None])
    plugin = load_plugin("kl_estimator", estimator, top_k=top_k)
    of_states = plugin(policy.log_probs[0], world.reference.log_softmax(1))[None]
    mean = (policy.probability.detach() * policy.of_states(of_states).sum(2)).sum() / world.prompts
    return float(mean.detach()), torch.autograd.grad(mean, leaf)[0]


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
