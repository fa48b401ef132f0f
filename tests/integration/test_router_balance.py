"""router_balance in runs: over a whole step, on by itself, refused without experts; a mixture of experts resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.batch import Completions
from hf_rlhf.metrics import metrics_of
from hf_rlhf.modeling.router import experts, experts_of_rows, experts_per_token
from hf_rlhf.registry.host import Host, use_host
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.completion_checks import check_completions
from tests.helpers import runs
from tests.helpers.models import tiny_llama, tiny_moe

ROLLOUT = {"use": "generate", "prompts": 4, "num_generations": 3, "max_new_tokens": 5}


def moe(**options: Any) -> Any:
    return tiny_moe(len(tiny_policy()[1]), dtype=torch.float64, **options)


def trainer(folder: Path, rows: int = 64, policy: Any = None, **parts: Any) -> Any:
    training = {"max_steps": 2, "per_device_train_batch_size": rows, **parts.pop("training", {})}
    return runs.trainer(
        folder, policy=policy or moe(), rollout=ROLLOUT, dtype=torch.float64, training=training, **parts
    )


def moved(made: Any) -> torch.Tensor:
    before = runs.parameters(made)
    made.train()
    made.close()
    return runs.parameters(made) - before


def test_fractions_are_those_of_the_whole_step_as_the_models_own_router_has_them(tmp_path):
    made = trainer(tmp_path, rows=2, update={"mini_batches": 2})
    buffer = made.collector.collect(0)
    k = experts_per_token(made.model.config)
    assert (experts(made.model.config), k) == (4, 2)
    for position in range(2):
        count, tokens = torch.zeros(3, 4), 0
        for i in buffer.step_rows(position, made.algorithm, made.args.seed).tolist():
            prompt, completion = buffer.prompt_ids[i], buffer.completion_ids[i]
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *completion]])
                layers = made.model(input_ids=ids, output_router_logits=True).router_logits
            own = torch.stack(layers, 1)[len(prompt) - 1 : -1]
            count += experts_of_rows(own[None], torch.ones(1, len(own)), k)[0]
            tokens += len(own)
        for micro in buffer.slot(position, made.algorithm, made.args.seed, made.collector.forwards.batching):
            fractions = micro["routing_fractions"]
            assert fractions.shape == (*micro["mask"].shape, 3, 4)
            torch.testing.assert_close(fractions[-1, -1], count.double() / tokens, rtol=1e-12, atol=1e-12)
            assert fractions.sum(-1).allclose(torch.tensor(2.0).double())
    made.close()


@pytest.mark.parametrize("pool", ["layer", "model"])
def test_any_split_gives_one_gradient(pool, tmp_path):
    """A strong term, so that the routers learn nothing else; transformers' rotary embedding rounds to float32."""
    terms = [{"use": "router_balance", "coef": 10.0, "pool": pool}]
    whole = moved(trainer(tmp_path / "whole", loss_terms=terms))
    assert whole.norm() > 0.1
    for rows in (1, 5):
        split = moved(trainer(tmp_path / str(rows), rows=rows, loss_terms=terms))
        assert (whole - split).norm() < 1e-6 * whole.norm()


def test_gradient_checkpointing_keeps_the_gradient(tmp_path):
    terms = [{"use": "router_balance", "coef": 10.0}]
    plain = moved(trainer(tmp_path / "plain", loss_terms=terms))
    kept = moved(trainer(tmp_path / "kept", loss_terms=terms, training={"gradient_checkpointing": True}))
    assert (plain - kept).norm() < 1e-6 * plain.norm()


def test_it_balances_the_experts(tmp_path):
    def balance(coef: float) -> float:
        """Mean entropy of the routing fractions over the last rollouts of 30 steps."""
        terms = [{"use": "router_balance", "coef": coef}]
        made = trainer(tmp_path / str(coef), loss_terms=terms, training={"max_steps": 30}, advantages="group_mean")
        moved(made)
        found = [entry["routing/entropy"] for entry in runs.entries(made) if "routing/entropy" in entry]
        return sum(found[-5:]) / 5

    assert balance(0.1) > balance(0.0) + 0.01


def test_it_is_on_where_the_configuration_has_a_coefficient_and_says_so(tmp_path):
    made = trainer(tmp_path / "on")
    assert [x.name for x in made.algorithm.loss_terms] == ["router_balance"]
    assert made.record["algorithm"]["loss_terms"] == [{"use": "router_balance", "coef": None, "pool": "layer"}]
    assert any("coefficient 0.001, which training on log-probs would drop" in remark for remark in made.plan.remarks)
    assert any("the experts of each token" in line or "old log-probs" in line for line in made.plan.forwards)
    on = moved(made)
    declared = {metric.name for metric in metrics_of(made.algorithm)}
    assert {"routing/max_load", "routing/min_load", "routing/entropy"} <= declared
    named = [{"use": "router_balance", "coef": 0.001}]
    assert torch.equal(on, moved(trainer(tmp_path / "named", loss_terms=named)))
    off = trainer(tmp_path / "off", policy=moe(router_aux_loss_coef=0.0))
    assert off.algorithm.loss_terms == []
    assert not torch.equal(on, moved(off))


def test_a_recipes_own_term_and_a_plugin_turned_off_are_left_alone(tmp_path):
    made = trainer(tmp_path, loss_terms=[{"use": "router_balance", "coef": 0.5}])
    assert [x.coef for x in made.algorithm.loss_terms] == [0.5]
    made.close()
    with use_host(Host(disable="loss_terms.router_balance")):
        made = trainer(tmp_path)
        assert made.algorithm.loss_terms == []
        made.close()


def test_without_a_coefficient_fractions_are_metrics_alone(tmp_path):
    policy = moe(router_aux_loss_coef=0.0)
    made = trainer(tmp_path / "metrics", policy=policy, loss_terms=["router_balance"])
    assert any("routing fractions are logged alone" in remark for remark in made.plan.remarks)
    one = moved(made)
    entry = runs.entries(made)[0]
    assert entry["plugin/router_balance/loss"] == 0
    assert 1 <= entry["routing/max_load"] <= 2
    assert 0 <= entry["routing/min_load"] <= 1
    assert 0 < entry["routing/entropy"] <= 1
    other = moved(trainer(tmp_path / "none", policy=moe(router_aux_loss_coef=0.0)))
    assert (one - other).norm() < 1e-6 * one.norm()


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"loss_terms.0=router_balance needs a mixture of experts, and the model is dense"
    ):
        runs.trainer(tmp_path, loss_terms=["router_balance"])
    assert experts(tiny_llama().config) == 0


def test_routed_experts_are_reserved(tmp_path):
    algorithm = runs.trainer(tmp_path).algorithm
    given: Any = Completions(ids=[[1]], finish_reasons=["stop"], routed_experts=[[[0, 1]]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="returned routed_experts, which are reserved"):
        check_completions(algorithm, given, 1, sampled=False, version="run:0")


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_a_mixture_of_experts_resumes_with_equal_bits(kind, tmp_path):
    """transformers saves each expert by itself, and Trainer skips the names that the model does not have."""
    sizes = {} if kind == "Mixtral" else {"num_experts": 4, "moe_intermediate_size": 8}

    def run(folder: str, steps: int, resume: bool = False) -> torch.Tensor:
        training = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        made = trainer(tmp_path / folder, policy=moe(kind=kind, **sizes), training=training, update={"ema": 0.5})
        made.train(resume_from_checkpoint=resume, overwrite=not resume)
        found = torch.cat([runs.parameters(made), *(x.flatten() for x in made.ema.tensors())])
        made.close()
        return found

    straight = run("straight", 4)
    run("stopped", 2)
    assert torch.equal(run("stopped", 4, resume=True), straight)
