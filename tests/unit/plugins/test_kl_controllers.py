"""How beta moves: closed forms, state, and the statistics that a run gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from tests.helpers import runs


def seen(rows: int = 100, **kl: float) -> dict[str, float]:
    return {"rollout/rows": rows, **{f"kl/rollout/{name}": x for name, x in kl.items()}}


@pytest.mark.proves("kl_controller.fixed", how="closed form", tolerance="0")
def test_fixed_is_the_recipes_beta_whatever_is_observed():
    controller = load_plugin("kl_controller", "fixed")
    controller.observe(seen(sequence=99.0, token=9.0))
    assert controller(0.05) == 0.05


@pytest.mark.proves("kl_controller.adaptive", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize(
    ("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (7.2, 0.2), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)]
)
def test_beta_grows_by_the_clipped_error_times_rows_over_horizon(kl: float, error: float):
    controller = load_plugin("kl_controller", "adaptive", target=6.0, horizon=10_000)
    assert controller(0.05) == 0.05
    controller.observe(seen(rows=512, sequence=kl, token=1.0))
    assert controller(0.05) == pytest.approx(0.05 * (1 + error * 512 / 10_000), rel=1e-12)


def test_factors_multiply_and_a_constant_excess_takes_a_horizon_to_add_a_fifth():
    controller = load_plugin("kl_controller", "adaptive", target=1.0, horizon=1000)
    for _ in range(10):
        controller.observe(seen(rows=100, sequence=5.0))
    assert controller(2.0) == pytest.approx(2.0 * 1.02**10, rel=1e-12)
    assert 1.2 < controller(2.0) / 2.0 < 1.23


def test_verls_dialect_reads_the_mean_over_tokens():
    controller = load_plugin("kl_controller", "adaptive", target=0.1, horizon=1000, statistic="token")
    controller.observe(seen(sequence=0.0, token=0.11))
    assert controller(1.0) == pytest.approx(1 + 0.1 * 100 / 1000, rel=1e-12)


def test_an_empty_rollout_moves_nothing():
    controller = load_plugin("kl_controller", "adaptive")
    controller.observe({"rollout/rows": 0})
    assert controller(0.3) == 0.3


def test_its_state_goes_on_where_it_was_saved():
    first, second = (load_plugin("kl_controller", "adaptive", horizon=500) for _ in range(2))
    first.observe(seen(sequence=6.5))
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.observe(seen(sequence=3.0))
    assert first(0.1) == second(0.1) != 0.1


def test_a_horizon_that_could_take_beta_below_0_is_refused():
    def problems(horizon: float) -> list[str]:
        algorithm: Any = SimpleNamespace(rollout=SimpleNamespace(prompts=10, num_generations=10))
        return list(load_plugin("kl_controller", "adaptive", horizon=horizon).check(algorithm))

    assert not problems(20.1)
    (problem,) = problems(20)
    assert "horizon must be above 20" in problem


@pytest.mark.parametrize("name", ["in_advantage", "in_loss", "in_reward"])
def test_every_penalty_uses_the_beta_of_now(name: str):
    placement = load_plugin("kl", name, beta=0.5, controller=load_plugin("kl_controller", "adaptive", horizon=1000))
    (place,) = placement.places
    kl = torch.rand(3, 4)
    placement.controller.observe(seen(sequence=60.0))
    torch.testing.assert_close(getattr(placement, f"{place}_penalty")(kl), 0.5 * 1.02 * kl)


def test_a_run_measures_the_kl_and_moves_beta_once_per_rollout(tmp_path: Path):
    controller = {"use": "adaptive", "target": 0.5, "horizon": 160}
    made = runs.trained(
        tmp_path,
        kl=[{"use": "in_loss", "estimator": "k2", "beta": 0.1, "controller": controller}],
        reference="frozen",
        training={"max_steps": 6},
    )
    beta, moved = 0.1, 0
    for entry in runs.entries(made):
        if "kl/rollout/sequence" in entry:  # 16 rows per rollout, two optimizer steps each
            error = min(max(entry["kl/rollout/sequence"] / 0.5 - 1, -0.2), 0.2)
            beta, moved = beta * (1 + error * 16 / 160), moved + 1
            assert entry["kl/in_loss/beta"] == pytest.approx(beta, rel=1e-9)
    (kl,) = made.algorithm.kl
    assert moved == 3
    assert kl.controller(0.1) == pytest.approx(beta, rel=1e-9) != 0.1
