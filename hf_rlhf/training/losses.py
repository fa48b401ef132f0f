"""Terms of the loss of one micro-batch, each a sum under the weights of the whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_rlhf.axes import KLEstimator, KLPlacement, TextTerm, TrainedCritic, check_output
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.references import ROWS, key_of, keyed
from hf_rlhf.data.model_loading import zero_dropout
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.metrics.rollout_statistics import CLIP
from hf_rlhf.modeling.lm_head import Derivative

POLICY_GETS = frozenset({"old_logps"})
ESTIMATOR_GETS = frozenset({"ref_logps"})
DISTRIBUTION = "distribution:"
"""Prefix of the (B, T) tensors from KL estimators over whole distributions."""
MEASURED = frozenset({"loss", "approx_kl", "ratio", "entropy", "grad_norm"})
"""Names under `policy/` that are measured for every policy loss."""


def policy_terms(
    a: Algorithm, new: dict[str, Tensor], inputs: dict[str, Any], meters: MetricAggregator
) -> dict[str, Tensor]:
    """Return policy loss, KL in the loss and loss terms. `new` holds the forward's (B, T) tensors, `inputs` the micro-batch."""
    terms, known, metrics = _terms(a, new, inputs, meters)
    with torch.no_grad():
        _measure(a, known, inputs["mask"], metrics, meters)
    return terms


def derivative(a: Algorithm, inputs: dict[str, Any]) -> Derivative:
    """Return the derivative of each sampled token's loss by that token's numbers, used where `a.loss_is_fused`."""
    batch = inputs["batch"]
    flat = {
        name: x[batch.rows, batch.columns]
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.shape == batch.shape
    }

    def of_tokens(values: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
        with torch.enable_grad(), torch.autocast(batch.device.type, enabled=False):
            leaves = {name: x.detach().unsqueeze(0).requires_grad_() for name, x in values.items()}
            own = {name: x[part].unsqueeze(0) for name, x in flat.items()}
            terms, _, _ = _terms(a, leaves, own, MetricAggregator())
            total = torch.stack(list(terms.values())).sum()
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {name: x.squeeze(0) for name, x in zip(leaves, found, strict=True) if x is not None}

    return of_tokens


def _terms(
    a: Algorithm, new: dict[str, Tensor], inputs: dict[str, Any], meters: MetricAggregator
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the terms, everything known of each token, and the metrics of the policy loss."""
    logps, mask, weights = new["logps"], inputs["mask"], inputs["weights"]
    known = {name: x for name, x in inputs.items() if isinstance(x, Tensor)} | new
    known.setdefault("old_logps", logps.detach())
    read = {name: x for name, x in known.items() if name != "values"}

    extras = a.extras(a.policy_loss, known, POLICY_GETS)
    found = a.policy_loss(logps, known["old_logps"], inputs["advantages"], mask, **extras)
    per_token, metrics = check_output("policy_loss", a.policy_loss, found, mask, inputs=read)
    correction = correction_of(a, known, mask, meters) if a.corrects_in_loss else inputs.get("correction")
    if correction is not None:
        per_token = per_token * correction
    terms = {"policy/loss": (per_token * weights).sum()}
    for title, kl in a.kl_in("loss"):
        penalty = penalty_of(kl, "loss", measured(a, title, kl, known, mask, meters), known.get(f"{ROWS}{title}"))
        weight = weights if penalty.dim() == 2 else one_token(weights, mask)
        terms[f"kl/{title}/loss"] = (penalty * weight).sum()
    for i, (title, term) in enumerate(a.titled("loss_terms")):
        if not isinstance(term, TextTerm):
            value = term(logps, mask, **a.extras(term, known, frozenset()))
            check_output("loss_terms", term, value, mask, inputs=read)
            terms[f"plugin/{title}/loss"] = (value * inputs[f"term_weights:{i}"]).sum()
    return terms, known, metrics


def correction_of(a: Algorithm, known: dict[str, Tensor], mask: Tensor, meters: MetricAggregator) -> Tensor:
    """Return what the rollout correction multiplies the loss of rows (R, T) with. `known`: both log-probs."""
    inputs = {"old_logps": known["old_logps"], "sampler_logps": known["sampler_logps"], "mask": mask}
    found = a.rollout_correction(*inputs.values())
    factors: Tensor = check_output("rollout_correction", a.rollout_correction, found, mask, inputs=inputs)
    meters.add("rollout/is_ratio/mean", (factors * mask).sum(), mask.sum())
    meters.add("rollout/is_ratio/zero_frac", ((factors == 0) * mask).sum(), mask.sum())
    return factors


def text_term(a: Algorithm, new: dict[str, Tensor], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the loss of a micro-batch of texts of a `TextTerm`."""
    title, term = a.titled("loss_terms")[inputs["text_term"]]
    value = term(new["logps"], inputs["mask"], **a.extras(term, new, frozenset()))
    check_output("loss_terms", term, value, inputs["mask"], inputs=new)
    return {f"plugin/{title}/loss": (value * inputs["weights"]).sum()}


def measured(
    a: Algorithm, title: str, kl: KLPlacement, known: dict[str, Tensor], mask: Tensor, meters: MetricAggregator
) -> Tensor:
    """Return a KL within its limit: (R, T), 0 off the mask, at level token, (R,) at level sequence. `known` holds logps, those
    of its reference and what the estimator needs, or the result of an estimator over whole distributions.

    Logs `kl/<title>/<estimator>`, summed over each row, and the share that the limit clips.
    """
    mask = known.get(f"{ROWS}{title}", mask)
    if "full_distribution" in kl.estimator.needs:
        raw = known[f"{DISTRIBUTION}{title}"] * mask
    else:
        reference = known[keyed("ref_logps", key_of(a, kl))]
        raw = kl.estimate(known["logps"], reference, mask, **a.extras(kl.estimator, known, ESTIMATOR_GETS))
    value, rows = kl.limit(raw), (mask > 0).any(1).sum()
    meters.add(f"kl/{title}/{kl.estimator.name}", value.sum(), rows)
    if kl.clamp is not None:
        meters.add(f"kl/{title}/clamp_frac", (raw != value).sum(), mask.sum() if raw.dim() == 2 else rows)
    return value


def over_distributions(
    compared: list[tuple[str, KLPlacement]], update: bool
) -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """Return name -> (estimator, whether it carries a gradient) of KLs over whole distributions, for `measures`."""

    def checked(estimator: KLEstimator) -> Callable[..., Tensor]:
        def measure(own: Tensor, reference: Tensor) -> Tensor:
            inputs, kl = {"log_probs": own, "ref_log_probs": reference}, estimator(own, reference)
            check_output("kl_estimator", estimator, kl, own[:, 0], inputs=inputs)
            return kl

        return measure

    return {f"{DISTRIBUTION}{title}": (checked(kl.estimator), update and "loss" in kl.places) for title, kl in compared}


def penalty_of(kl: KLPlacement, place: str, measured: Tensor, rows: Tensor | None) -> Tensor:
    """Return the penalty of a measured KL, in its shape, at a place: reward, loss or advantage. `rows` (R, T): the mask of the
    rows on which it is taken, if not all."""
    method = f"{place}_penalty"
    # an estimator's numbers that are not finite cost an optimizer step, but in a rollout the run
    inputs = {"kl": measured} if place == "loss" else {}
    penalty: Tensor = check_output("kl", kl, getattr(kl, method)(measured), measured, method=method, inputs=inputs)
    return penalty if rows is None else penalty * (rows if penalty.dim() == 2 else (rows > 0).any(1))


def one_token(weights: Tensor, mask: Tensor) -> Tensor:
    """Return the weight of one token of each row, (B, T) -> (B,), so that beta means the same at both levels."""
    first = (mask > 0).int().argmax(1, keepdim=True)
    return weights.gather(1, first).squeeze(1)


def _measure(
    a: Algorithm, known: dict[str, Tensor], mask: Tensor, metrics: dict[str, Tensor], meters: MetricAggregator
) -> None:
    tokens, rows = mask.sum(), (mask > 0).any(1).sum()
    logps, old = known["logps"], known["old_logps"]
    log_ratio = (logps - old) * mask
    if "old_logps" in a.policy_loss.needs or a.readers_of_old_logps:  # else the sampling policy is unknown
        meters.add("policy/approx_kl", ((log_ratio.expm1() - log_ratio) * mask).sum(), tokens)
        meters.add("policy/ratio", (log_ratio.exp() * mask).sum(), tokens)
    if a.update.old_logps == "lazy" and "sampler_logps" in known:
        gap = (old - known["sampler_logps"]) * mask
        meters.add("rollout/sampler_gap/mean", gap.abs().sum(), tokens)
        meters.add("rollout/sampler_gap/beyond_clip", (gap.expm1().abs() > CLIP).any(1).sum(), rows)
    meters.add("policy/entropy", (known.get("entropy", -logps) * mask).sum(), tokens)
    if taken := sorted(MEASURED & metrics.keys()):
        raise ValueError(
            f"policy_loss={a.policy_loss.name} returns the metric {', '.join(map(repr, taken))}, but policy/{taken[0]} is "
            "measured for every policy loss. Rename it"
        )
    for name, x in metrics.items():
        meters.add(f"policy/{name}", (x * mask).sum(), tokens)
    if "ref_logps" in known:
        meters.add("kl/ref", ((old - known["ref_logps"]) * mask).sum(), rows)
    for title, kl in a.titled("kl"):
        if not kl.places:
            measured(a, title, kl, known, mask, meters)


def value_term(
    critic: TrainedCritic, values: Tensor, inputs: dict[str, Any], meters: MetricAggregator
) -> dict[str, Tensor]:
    """Return coef x 0.5 x mean squared error over the tokens at which the critic learns, clipped as in PPO (arXiv:1707.06347;
    implementation detail 9)."""
    mask, returns, old = inputs.get("value_mask", inputs["mask"]), inputs["returns"], inputs["values"]
    error = (values - returns) ** 2
    if critic.value_clip != "none":
        bounded = old + (values - old).clamp(-critic.value_clip, critic.value_clip)
        clipped = (bounded - returns) ** 2
        meters.add("value/clip_frac", ((clipped > error) * mask).sum(), mask.sum())
        error = torch.maximum(error, clipped)
    return {"value/loss": critic.coef * 0.5 * (error * inputs["value_weights"]).sum()}


def build_critic(a: Algorithm, policy: Any, dropout: bool) -> nn.Module | None:
    """Build the critic's module, if there is one; the values of each of its calls are checked."""
    built, critic = a.critic.build(policy, a), a.critic
    if not isinstance(critic, TrainedCritic):
        return built
    module: nn.Module = check_output("critic", critic, built, None, method="build")
    if not dropout:
        zero_dropout(module)

    def check(_: nn.Module, inputs: tuple[Any, ...], values: Any) -> None:
        learned = next((x for x in module.parameters() if x.requires_grad), None)
        check_output("critic", critic, values, inputs[0].targets, method="forward", inputs={"weight": learned})

    module.register_forward_hook(check)
    return module


def at_last_token(x: Tensor, mask: Tensor) -> Tensor:
    """Place `x` (n,) at each row's last position with mask 1: (n, T), 0 elsewhere."""
    last = mask.size(1) - 1 - (mask > 0).int().flip(1).argmax(1)
    return torch.zeros_like(mask).scatter(1, last.unsqueeze(1), x.unsqueeze(1)) * (mask > 0)
