"""Each loss of trainer.dpo against its formula in float64 on a tiny model, with gradients; bounds; f-divergences; masks."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.conformance.offline_trainers import trainer_of
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.testing import tiny_policy
from hf_rlhf_plugins.trainer._dpo_losses import BOUNDED, LossType, own_loss, score, smoothed
from tests.helpers import dpo_runs as dpo

BETA, SMOOTH, TAU = 0.7, 0.1, 0.05
S, L = torch.sigmoid, lambda x: torch.log(torch.sigmoid(x))


def exo(x: Tensor, **_: Any) -> Tensor:
    eps = 0.1
    return S(x) * (S(x).log() - math.log(1 - eps)) + S(-x) * (S(-x).log() - math.log(eps))


def discopop(x: Tensor, **_: Any) -> Tensor:
    mix = S(x / TAU)
    return -L(x) * (1 - mix) + torch.exp(-x) * mix


OF_X: dict[str, Any] = {
    "sigmoid": lambda x: -L(x),
    "hinge": lambda x: torch.clamp(1 - x, min=0),
    "robust": lambda x: (-(1 - SMOOTH) * L(x) + SMOOTH * L(-x)) / (1 - 2 * SMOOTH),
    "exo_pair": exo,
    "discopop": discopop,
    "fidelity": lambda x: 1 - S(x).sqrt(),
    "savage": lambda x: 1 / (1 + x.exp()) ** 2,
    "symmetric": lambda x: 1 / (1 + x.exp()),
}
"""Losses of x = beta (d_c - d_r)."""
OF_BOTH: dict[str, Any] = {
    "nca_pair": lambda c, r, b: -L(b * c) - 0.5 * L(-b * c) - 0.5 * L(-b * r),
    "bco_pair": lambda c, r, b: -L(b * c) - L(-b * r),
    "sppo_hard": lambda c, r, b: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "apo_zero": lambda c, r, b: 1 - S(b * c) + S(b * r),
    "apo_down": lambda c, r, b: S(b * c) + 1 - S(b * (c - r)),
}
"""Losses of the two log-ratios and beta."""
AVERAGED: dict[str, Any] = {
    "ipo": lambda c, r, b: (c - r - 1 / (2 * b)) ** 2,
    "sigmoid_norm": lambda c, r, b: -L(b * (c - r)),
}
"""Losses of the log-ratios per token."""
SETTINGS: dict[str, dict[str, Any]] = {
    "robust": {"label_smoothing": SMOOTH},
    "exo_pair": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": TAU},
}


def formula(loss_type: str, trainer: Any, reference: Any, f: Any = lambda d: d) -> Tensor:
    """The mean loss by hand; `f` maps log-ratios to scores."""
    c, r = (
        f(dpo.by_hand(trainer.model, trainer, side) - dpo.by_hand(reference, trainer, side).detach())
        for side in ("chosen", "rejected")
    )
    if loss_type in OF_X:
        return OF_X[loss_type](BETA * (c - r)).mean()
    if loss_type in AVERAGED:
        c, r = c / dpo.lengths(trainer, "chosen").clamp(min=1), r / dpo.lengths(trainer, "rejected").clamp(min=1)
        return AVERAGED[loss_type](c, r, BETA).mean()
    return OF_BOTH[loss_type](c, r, BETA).mean()


def assert_equals(trainer: Any, wanted: Tensor, tolerance: float) -> None:
    loss, gradient = dpo.loss_and_gradient(trainer)
    by_hand = dpo.gradient(trainer.model, wanted)
    assert loss == pytest.approx(wanted.item(), abs=tolerance)
    assert by_hand.norm() > 1e-3
    assert (gradient - by_hand).abs().max() < tolerance * max(1, float(by_hand.abs().max()))


def test_every_loss_type_has_a_formula_here():
    assert {*OF_X, *OF_BOTH, *AVERAGED} == set(get_args(LossType))


@pytest.mark.proves("trainer.dpo", how="closed form", tolerance="1e-10")
@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_a_loss_and_its_gradient_are_those_of_its_formula(loss_type, tmp_path):
    trainer = dpo.small(tmp_path, beta=BETA, loss_type=loss_type, **SETTINGS.get(loss_type, {}))
    reference = trainer.ref_model
    dpo.moved(trainer)
    # TRL takes the logarithm of exo's smoothing in float32
    assert_equals(trainer, formula(loss_type, trainer, reference), 1e-6 if loss_type == "exo_pair" else 1e-10)


def test_a_smoothed_sigmoid_loss_is_the_mean_over_labels_that_are_turned_around(tmp_path):
    trainer = dpo.small(tmp_path, beta=BETA, label_smoothing=SMOOTH)
    reference = trainer.ref_model
    dpo.moved(trainer)
    c, r = (
        dpo.by_hand(trainer.model, trainer, side) - dpo.by_hand(reference, trainer, side).detach()
        for side in ("chosen", "rejected")
    )
    x = BETA * (c - r)
    assert_equals(trainer, (-(1 - SMOOTH) * L(x) - SMOOTH * L(-x)).mean(), 1e-10)
    lowest = math.log((1 - SMOOTH) / SMOOTH)  # where the probability of the label is 1 - a
    around = smoothed(torch.tensor([lowest - 0.01, lowest, lowest + 0.01]).double(), SMOOTH)
    assert around.argmin() == 1
    plain = dpo.loss_and_gradient(dpo.moved(dpo.small(tmp_path, beta=BETA)))[0]
    assert plain == pytest.approx((-L(x)).mean().item(), abs=1e-10)


def test_robust_is_unbiased_and_the_smoothed_loss_is_not():
    """Over labels that are wrong with probability a, the robust loss has the mean of the plain one."""
    x = torch.linspace(-5, 5, 41).double()
    robust = OF_X["robust"]
    torch.testing.assert_close((1 - SMOOTH) * robust(x) + SMOOTH * robust(-x), -L(x), rtol=0, atol=1e-12)
    assert ((1 - SMOOTH) * smoothed(x, SMOOTH) + SMOOTH * smoothed(-x, SMOOTH) + L(x)).abs().max() > 0.1


AT_START = {
    "sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * BETA**2), "robust": math.log(2), "bco_pair": 2 * math.log(2),
    "nca_pair": 2 * math.log(2), "sppo_hard": 1 / (2 * BETA**2), "apo_zero": 1.0, "apo_down": 1.0,
    "discopop": (math.log(2) + 1) / 2, "sigmoid_norm": math.log(2), "fidelity": 1 - math.sqrt(0.5), "savage": 0.25,
    "symmetric": 0.5, "exo_pair": -math.log(2) - 0.5 * math.log(0.9 * 0.1),
}  # fmt: skip


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_at_the_start_policy_and_reference_are_one(loss_type, tmp_path):
    trainer = dpo.small(tmp_path, beta=BETA, loss_type=loss_type, **SETTINGS.get(loss_type, {}))
    tolerance = 1e-6 if loss_type == "exo_pair" else 1e-12
    assert dpo.loss_and_gradient(trainer)[0] == pytest.approx(AT_START[loss_type], abs=tolerance)


# Bounds


@pytest.mark.parametrize(("name", "most", "where", "at_minus_10"), [
    ("fidelity", 1 / (3 * math.sqrt(3)), 1 / 3, 0.0034), ("savage", 8 / 27, 1 / 3, 0.00009), ("symmetric", 0.25, 0.5, 0.000045),
])  # fmt: skip
def test_a_bounded_loss_lies_in_0_1_and_its_gradient_is_largest_where_it_is_said(name, most, where, at_minus_10):
    x = torch.linspace(-36, 36, 72001).double().requires_grad_()
    y = BOUNDED[name](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.min().item() > 0
    assert y.max().item() < 1
    assert (slope <= 0).all()
    assert slope.abs().max().item() == pytest.approx(most, abs=1e-6)
    assert S(x[slope.abs().argmax()]).item() == pytest.approx(where, abs=1e-3)
    at = torch.tensor([-10.0, -1000.0, 1000.0]).double().requires_grad_()
    (found,) = torch.autograd.grad(BOUNDED[name](at).sum(), at)
    assert -found[0].item() == pytest.approx(at_minus_10, abs=0.05 * at_minus_10)
    assert found[1:].tolist() == pytest.approx([0, 0], abs=1e-100)
    (kept,) = torch.autograd.grad(smoothed(at, 0.0).sum(), at)
    assert -kept[0].item() == pytest.approx(1.0, abs=1e-4)


def test_the_symmetric_loss_of_a_pair_and_its_turned_label_is_a_constant():
    x = torch.linspace(-9, 9, 19).double()
    torch.testing.assert_close(BOUNDED["symmetric"](x) + BOUNDED["symmetric"](-x), torch.ones(19).double())


# f-divergences


DIVERGENCES: dict[str, tuple[Any, float | None]] = {
    "forward_kl": (lambda t: 1 - 1 / t, None),
    "js_divergence": (lambda t: torch.log(2 * t / (t + 1)), None),
    "alpha_divergence": (lambda t: (t ** (0.3 - 1) - 1) / (0.3 - 1), 0.3),
}
"""f'(t) of t = pi / pi_ref."""


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", ["fidelity", "sigmoid", "hinge", "ipo"])
def test_an_f_divergence_compares_its_derivatives_at_the_ratios(loss_type, divergence, tmp_path):
    derivative, alpha = DIVERGENCES[divergence]
    settings: dict[str, Any] = {"f_divergence_type": divergence, "f_alpha_divergence_coef": alpha}
    if divergence == "alpha_divergence" and loss_type not in ("fidelity",):
        with pytest.raises(ValueError, match="does not support float64"):
            dpo.small(tmp_path, beta=BETA, loss_type=loss_type, **settings)
        return
    trainer = dpo.small(tmp_path, beta=BETA, loss_type=loss_type, **settings)
    reference = trainer.ref_model
    dpo.moved(trainer, 0.02)
    assert_equals(trainer, formula(loss_type, trainer, reference, lambda d: derivative(d.exp())), 1e-9)


def test_trls_alpha_divergence_is_the_formula_in_float32(tmp_path):
    words = (
        "trainer.f_divergence_type=alpha_divergence",
        "trainer.f_alpha_divergence_coef=0.3",
        f"trainer.beta={BETA}",
    )
    trainer = dpo.made(tmp_path, "model.dtype=float32", *words)
    reference = trainer.ref_model
    dpo.moved(trainer, 0.02)
    wanted = formula("sigmoid", trainer, reference, lambda d: DIVERGENCES["alpha_divergence"][0](d.double().exp()))
    assert dpo.loss_and_gradient(trainer)[0] == pytest.approx(wanted.item(), rel=1e-5)


def test_scores_tend_to_the_kls_at_the_ends_of_alpha_and_do_not_overflow():
    d = torch.linspace(-3, 3, 13).double()
    torch.testing.assert_close(score(d, "alpha_divergence", 1.0), d)
    torch.testing.assert_close(score(d, "alpha_divergence", 1.001), d, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(score(d, "alpha_divergence", 0.0), score(d, "forward_kl", 0.5))
    far = torch.tensor([-1e4, 1e4])
    for divergence in DIVERGENCES:
        assert score(far, divergence, 0.3).isfinite().all()  # type: ignore[arg-type]


# What the loss compares


SUMMED = ["sigmoid", "hinge", "robust", "fidelity", "savage"]


@pytest.mark.parametrize(("loss_type", "same"), [*((x, True) for x in SUMMED), ("ipo", False), ("sigmoid_norm", False),
                                                 ("bco_pair", False), ("apo_zero", False)])  # fmt: skip
def test_a_shared_prefix_changes_averaged_and_single_losses_and_no_difference_of_sums(loss_type, same, tmp_path):
    settings = {"beta": BETA, "loss_type": loss_type, **SETTINGS.get(loss_type, {})}
    kept, masked = (
        dpo.loss_and_gradient(dpo.moved(dpo.small(tmp_path, mask_shared_prefix=mask, **settings)))
        for mask in (False, True)
    )
    assert (abs(kept[0] - masked[0]) < 1e-12) == same
    # Llama's norm works in float32: gradients that cancel leave its rounding
    assert ((kept[1] - masked[1]).norm() < 1e-6 * kept[1].norm()) == same


def test_a_masked_prefix_ends_at_the_first_difference_and_changes_what_is_logged(tmp_path):
    trainers = [dpo.moved(dpo.small(tmp_path, mask_shared_prefix=mask)) for mask in (False, True)]
    counts = [[len(row["prompt_ids"]) for row in trainer.train_dataset] for trainer in trainers]
    assert counts == [[4, 5, 2, 5], [4, 6, 11, 5]]  # "2" of 21 and 2, and "so it is "
    for trainer in trainers:
        dpo.loss_and_gradient(trainer)
    logged = [trainer._metrics["eval"] for trainer in trainers]
    assert logged[0]["rewards/margins"] == pytest.approx(logged[1]["rewards/margins"], abs=1e-12)
    for name in ("logps/chosen", "rewards/chosen", "entropy"):
        assert abs(logged[0][name][0] - logged[1][name][0]) > 1e-6


# Settings


@pytest.mark.parametrize(("settings", "message"), [
    ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing must be 0 with loss_type=hinge, got 0.1"),
    ({"loss_type": "exo_pair"}, "Set trainer.label_smoothing=0.001"),
    ({"f_divergence_type": "forward_kl", "loss_type": "bco_pair"}, "leaves a constant in each score"),
    ({"f_alpha_divergence_coef": 0.3}, "needs f_divergence_type=alpha_divergence"),
    ({"discopop_tau": 0.3}, "needs loss_type=discopop"),
])  # fmt: skip
def test_a_setting_that_nothing_would_read_is_refused_with_the_fix(settings, message):
    with pytest.raises(UserError, match=message):
        load_plugin("trainer", "dpo", **settings)


def test_only_what_trl_lacks_is_computed_here():
    made = {x for x in get_args(LossType) if own_loss(x, 0.1, 0.0, "reverse_kl", 0.5) is not None}
    assert made == {"fidelity", "savage", "symmetric"}
    assert own_loss("sigmoid", 0.1, 0.2, "reverse_kl", 0.5) is not None
    assert own_loss("robust", 0.1, 0.2, "reverse_kl", 0.5) is None


def test_a_mixture_of_experts_keeps_its_balancing_loss_beside_any_loss(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    base, tokenizer = tiny_policy(dtype=torch.float64)
    config = Qwen3MoeConfig(
        vocab_size=base.config.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        decoder_sparse_step=1, pad_token_id=0, eos_token_id=1, router_aux_loss_coef=0.5,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the others have no float64
    added = []
    for loss_type in ("sigmoid", "fidelity"):
        plugin = load_plugin("trainer", "dpo", loss_type=loss_type)
        trainer = trainer_of(plugin, (Qwen3MoeForCausalLM(config), tokenizer), dpo.ROWS, str(tmp_path))
        assert trainer.aux_loss_enabled
        with_experts, _ = dpo.loss_and_gradient(trainer)
        trainer.aux_loss_enabled = False
        added.append(with_experts - dpo.loss_and_gradient(trainer)[0])
    assert added[0] == pytest.approx(added[1], rel=1e-6)
    assert added[0] > 0.1
