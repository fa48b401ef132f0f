"""What the DPO trainer relies on and TRL does not document: each fact fails here, by name, where TRL has changed."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from hf_rlhf_plugins.trainer._dpo_losses import LEFT_OUT, OF_DIFFERENCES, OWN, LossType
from hf_rlhf_plugins.trainer._pair_trainer import REFERENCE, PairTrainer
from tests.helpers import dpo_runs as dpo

CALLED = {
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
    "_compute_loss": ["self", "model", "inputs", "return_outputs"],
    "compute_ref_log_probs": ["self", "model", "inputs"],
}


@pytest.mark.parametrize("method", CALLED)
def test_trl_has_the_method_with_these_parameters(method):
    assert list(inspect.signature(getattr(DPOTrainer, method)).parameters) == CALLED[method]
    source = inspect.getsource(DPOTrainer)
    assert f"self.{method}(" in source or method == "compute_ref_log_probs", f"TRL does not call {method} any more"


def test_the_loss_types_are_trls_and_three_more():
    (told,) = (f.metadata["help"] for f in fields(DPOConfig) if f.name == "loss_type")
    trls = set(re.findall(r"`'(\w+)'`", told))
    assert trls == set(get_args(LossType)) - set(OWN) | set(LEFT_OUT), "TRL has other losses: see _dpo_losses.py"
    (told,) = (f.metadata["help"] for f in fields(DPOConfig) if f.name == "f_divergence_type")
    assert set(re.findall(r"`'(\w+)'`", told)) == OF_DIFFERENCES - set(OWN) | {"sft"}


def test_settings_that_are_handed_on_are_there():
    named = {f.name for f in fields(DPOConfig)}
    assert {"beta", "loss_type", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau",
            "max_length", "disable_dropout", "precompute_ref_log_probs"} <= named  # fmt: skip


def test_a_loss_of_no_types_is_0_and_is_logged_all_the_same(tmp_path):
    trainer = dpo.moved(dpo.small(tmp_path, loss_type="fidelity"))
    trainer.model.eval()
    batch = dpo.batch_of(trainer)
    references = dict(zip(REFERENCE, trainer.reference(batch), strict=True))
    assert trainer.loss_types == []
    assert DPOTrainer._compute_loss(trainer, trainer._called(trainer.model), {**batch, **references}, False) == 0.0
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"} <= trainer._metrics["eval"].keys()


def test_precomputed_log_probs_are_read_in_the_batch(tmp_path):
    trainer = dpo.small(tmp_path)
    batch = dpo.batch_of(trainer)
    changed = {name: torch.full((len(dpo.ROWS),), x) for name, x in zip(REFERENCE, (-1.0, -9.0), strict=True)}
    trainer.model.eval()
    chosen, rejected = (x.detach() for x in trainer.policy(batch))
    x = trainer.beta * ((chosen + 1) - (rejected + 9))
    found = trainer.compute_loss(trainer.model, {**batch, **changed})
    assert found.item() == pytest.approx(-x.sigmoid().log().mean().item(), abs=1e-10)


def test_the_fused_head_gives_the_log_probs_of_the_labels(tmp_path):
    """In float32, where TRL's own head is at work."""
    trainer = dpo.made(tmp_path, "model.dtype=float32")
    for model, ask in ((trainer.model, trainer.policy), (trainer.ref_model, trainer.reference)):
        assert "fused_lm_head" in inspect.signature(model.forward, follow_wrapped=False).parameters
        with torch.no_grad():
            found = ask(dpo.batch_of(trainer))
            for side, x in zip(("chosen", "rejected"), found, strict=True):
                torch.testing.assert_close(x, dpo.by_hand(model, trainer, side), rtol=1e-5, atol=1e-5)


def test_trls_own_loss_in_float32_is_that_of_float64(tmp_path):
    wide = dpo.loss_and_gradient(dpo.moved(dpo.made(tmp_path)))
    narrow = dpo.loss_and_gradient(dpo.moved(dpo.made(tmp_path, "model.dtype=float32")))
    assert narrow[0] == pytest.approx(wide[0], rel=1e-5)
    assert (narrow[1] - wide[1]).norm() < 1e-4 * wide[1].norm()


def test_trl_copies_an_adapter_and_the_copy_is_taken_away(tmp_path):
    pytest.importorskip("peft")
    made = dpo.made(tmp_path, "model.lora={r: 2}")
    assert list(made.model.peft_config) == ["default"]
    assert made.ref_model is None
    assert 'add_adapter("ref"' in inspect.getsource(DPOTrainer.__init__), "TRL copies no adapter any more"


def test_making_it_tells_nobody(tmp_path, monkeypatch):
    from trl.trainer import base_trainer

    told: list[Any] = []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *a, **k: told.append(k))
    monkeypatch.delenv("CI", raising=False)
    assert isinstance(dpo.small(tmp_path), PairTrainer)
    assert told == []
