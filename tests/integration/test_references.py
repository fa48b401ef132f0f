"""References of single KLs: a teacher beside an anchor, run once per rows, the same bits as the recipe's reference."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import Metric
from hf_rlhf.axes import Reference
from hf_rlhf.batch import ReferenceRows
from hf_rlhf.config.plan import make_plan
from hf_rlhf.config.recipe import resolve
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.metrics import metrics_of
from hf_rlhf.modeling.policy import why_not_packed
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.memory.estimate import estimate
from hf_rlhf_plugins.kl_estimator.exact import Exact
from tests.helpers import runs


def saved(folder: Path, seed: int = 1, rows: int | None = None, sharpness: float = 6.0) -> str:
    """A model with clear preferences on disk, with the tokenizer of `tiny_policy`."""
    model, tokenizer = tiny_policy(seed=seed)
    model.get_output_embeddings().weight.data *= sharpness
    if rows is not None:
        model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("teacher"))


EXACT, K2, K1 = ({"use": "in_loss", "beta": 1.0, "estimator": x} for x in ("exact", "k2", "k1_is"))
IN_REWARD = {"use": "in_reward", "beta": 0.5}
IN_ADVANTAGE = {"use": "in_advantage", "beta": 0.5}
EXACT_IN_REWARD = {"use": "in_reward", "beta": 0.5, "estimator": "exact"}
KLS = [EXACT, K2, K1, IN_REWARD, IN_ADVANTAGE, EXACT_IN_REWARD, {**K2, "level": "sequence"}, {"use": "monitor"}]
IDS = ["exact", "k2", "k1_is", "in_reward", "in_advantage", "exact in_reward", "sequence", "monitor"]


@pytest.mark.parametrize("kl", KLS, ids=IDS)
@pytest.mark.parametrize("reference", ["frozen", {"use": "sync", "every": 1}, "model"], ids=["frozen", "sync", "model"])
def test_a_nested_reference_is_the_recipes_to_the_bit(tmp_path, teacher, kl, reference):
    own = {"use": "model", "path": teacher} if reference == "model" else reference
    rest = {"update": {"mini_batches": 2, "epochs": 2}, "training": {"max_steps": 6}}
    outer = runs.trained(tmp_path / "outer", kl=[kl], reference=own, **rest)
    inner = runs.trained(tmp_path / "inner", kl=[{**kl, "reference": own}], **rest)
    assert torch.equal(runs.parameters(outer), runs.parameters(inner))
    names = [{x: y for x, y in entry.items() if x.startswith(f"kl/{kl['use']}")} for entry in runs.entries(outer)]
    assert names[0]
    assert names == [{x: y for x, y in entry.items() if x in names[0]} for entry in runs.entries(inner)]
    assert "kl/ref" in runs.entries(outer)[0]
    assert "kl/ref" not in runs.entries(inner)[0]  # the recipe's alone


def passes(made: Any) -> Counter[str]:
    """Rows' tokens through the trunk of each distinct model during training, without those of the policy that samples."""
    counts: Counter[str] = Counter()
    models = {label: own for label, (_, own) in made.collector.forwards.references.models.items() if own is not None}
    for label, own in models.items():
        why_not_packed(own)  # found out once, by forwards of its own

        def seen(module: Any, args: Any, out: Any, label: str = label) -> None:
            counts[label] += out.numel() // out.size(-1)

        own.get_input_embeddings().register_forward_hook(seen)
    made.train()
    made.close()
    return counts


@pytest.mark.parametrize("first", [EXACT, K2, EXACT_IN_REWARD], ids=["exact", "k2", "exact in_reward"])
def test_a_teacher_and_an_anchor_cost_the_sum_of_their_forwards(tmp_path, teacher, first):
    other = {"use": "model", "path": teacher}
    alone = passes(runs.trainer(tmp_path / "1", kl=[{**first, "reference": other}]))
    anchor = passes(runs.trainer(tmp_path / "2", kl=[IN_REWARD], reference="frozen"))
    both = passes(runs.trainer(tmp_path / "3", kl=[{**first, "reference": other}, IN_REWARD], reference="frozen"))
    assert both == {"reference.in_loss" if first["use"] == "in_loss" else "reference.in_reward": alone.total()} | anchor
    assert alone.total() > 0


def test_equal_references_are_one_model_run_once_per_rows(tmp_path, teacher):
    other = {"use": "model", "path": teacher}
    one = passes(runs.trainer(tmp_path / "1", kl=[{**K2, "reference": other}]))
    made = runs.trainer(tmp_path / "2", kl=[{**kl, "reference": other} for kl in (K2, IN_REWARD, IN_ADVANTAGE)])
    assert passes(made) == one
    assert len(one) == 1
    made = runs.trainer(tmp_path / "3", kl=[{**EXACT, "reference": other}, {**EXACT, "beta": 2, "reference": other}])
    assert passes(made) == passes(runs.trainer(tmp_path / "4", kl=[{**EXACT, "reference": other}]))
    made = runs.trainer(tmp_path / "5", kl=[K2, {**IN_REWARD, "reference": "frozen"}], reference="frozen")
    assert list(made.collector.forwards.references.scorers) == [""]
    made.close()


def test_each_kl_is_measured_against_its_own_reference(tmp_path, teacher):
    """A step from the start: the anchor is the policy itself, so that its KL and its gradient are 0."""
    kls = [{**K2, "reference": {"use": "model", "path": teacher}}, {**K2, "label": "anchor", "beta": 5.0}]
    alone = runs.trained(tmp_path / "1", kl=kls[:1], training={"max_steps": 1}, update={})
    both = runs.trained(tmp_path / "2", kl=kls, reference="frozen", training={"max_steps": 1}, update={})
    torch.testing.assert_close(runs.parameters(both), runs.parameters(alone), rtol=0, atol=1e-7)
    (entry,) = runs.entries(both)
    assert abs(entry["kl/anchor/k2"]) < 1e-6 < entry["kl/in_loss/k2"] == runs.entries(alone)[0]["kl/in_loss/k2"]
    assert abs(entry["kl/ref"]) < 1e-6


@pytest.mark.proves("reference.model", how="closed form", tolerance="1e-12")
def test_the_step_is_that_of_the_exact_gradient_of_both_kls(tmp_path, teacher):
    """Completions of one token: the estimator `exact` sums over the vocabulary, so that no sampling remains."""
    one = {"use": "generate", "prompts": 4, "num_generations": 2, "max_new_tokens": 1}
    kls = [{**EXACT, "reference": {"use": "model", "path": teacher}}, {**EXACT, "label": "anchor", "beta": 0.5}]
    data = runs.problems(4)
    parts = {"kl": kls, "reference": {"use": "model", "path": saved(tmp_path / "other", seed=3)}, "rollout": one}
    parts |= {"rewards": [], "advantages": "leave_one_out", "update": {}, "training": {"max_steps": 1}}
    made = runs.trainer(tmp_path / "run", **parts, data=data, dtype=torch.float64)
    policy, models = made.actor_critic.policy, made.collector.forwards.references.models
    total = torch.zeros((), dtype=torch.float64)
    for row in data:
        ids = torch.tensor([made.processing_class(row["prompt"]).input_ids])
        p, q, anchor = (
            model(ids).logits[0, -1].log_softmax(-1)
            for model in (policy, models["reference.in_loss"][1], models["reference"][1])
        )
        total = total + ((p.exp() * (p - q)).sum() + 0.5 * (p.exp() * (p - anchor)).sum()) / len(data)
    gradient = torch.autograd.grad(total, list(policy.parameters()))
    expected = runs.parameters(made) - 0.1 * torch.cat([x.flatten() for x in gradient])
    made.train()
    made.close()
    torch.testing.assert_close(runs.parameters(made), expected, rtol=0, atol=1e-12)


# Rows by column


def tasks() -> list[dict[str, Any]]:
    return [row | {"task": "math" if i % 2 else "code"} for i, row in enumerate(runs.problems(6))]


@pytest.mark.parametrize("kl", KLS, ids=IDS)
def test_kls_by_task_sum_to_one_over_all_rows(tmp_path, teacher, kl):
    other = {"use": "model", "path": teacher}
    whole = runs.trained(tmp_path / "1", kl=[{**kl, "reference": other}], data=tasks())
    named = [{**kl, "reference": other, "when": {"task": x}, "label": x} for x in ("math", "code")]
    parts = runs.trained(tmp_path / "2", kl=named, data=tasks())
    torch.testing.assert_close(runs.parameters(parts), runs.parameters(whole), rtol=0, atol=1e-6)
    never = [{**kl, "reference": other, "when": {"task": ["art"]}, "label": "never"}]
    none = runs.trained(tmp_path / "3", kl=never, data=tasks())
    without = runs.parameters(runs.trained(tmp_path / "4", kl=[], data=tasks()))
    torch.testing.assert_close(runs.parameters(none), without, rtol=0, atol=1e-6)


def test_a_misspelt_column_of_when_is_refused_before_a_model_loads(tmp_path):
    with pytest.raises(ValueError, match=r"kl\.in_loss\.when reads tsk.*Did you mean 'task'"):
        runs.trainer(tmp_path, kl=[{**K2, "when": {"tsk": "math"}}], reference="frozen", data=tasks())


# Top k


@dataclass(kw_only=True)
class Top(Exact):
    """The exact KL over the reference's likeliest tokens."""

    top_k: int | None = None


@pytest.mark.parametrize("kl", [EXACT, EXACT_IN_REWARD], ids=["in_loss", "in_reward"])
def test_the_teachers_likeliest_tokens_are_asked_once_per_rollout(tmp_path, teacher, kl):
    found, counts = [], []
    for k in (5, 10_000, None):
        own = {**kl, "estimator": Top(top_k=k), "reference": {"use": "model", "path": teacher}}
        made = runs.trainer(tmp_path / str(k), kl=[own], update={"epochs": 3}, training={"max_steps": 3})
        counts.append(passes(made).total())
        found.append(made)
    assert counts[0] == counts[1] == counts[2] / (3 if kl is EXACT else 1)
    few, every, whole = (runs.entries(x)[0][f"kl/{kl['use']}/exact"] for x in found)
    assert 0 < few < whole == pytest.approx(every, rel=1e-4)  # a lower bound
    torch.testing.assert_close(runs.parameters(found[1]), runs.parameters(found[2]), rtol=1e-4, atol=1e-5)


# Vocabularies


def test_rows_that_stand_for_no_token_are_left_out(tmp_path):
    """A teacher with more rows: the extra ones, however likely, change nothing."""
    plain = saved(tmp_path / "plain")
    found = []
    for name, extra in (("a", 0.0), ("b", 30.0)):
        model, tokenizer = tiny_policy(seed=1)
        model.get_output_embeddings().weight.data *= 6
        rows = len(model.get_input_embeddings().weight)
        model.resize_token_embeddings(rows + 8)
        model.get_output_embeddings().weight.data[rows:] = extra
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        for kl in (EXACT, K2):
            own = {**kl, "reference": {"use": "model", "path": str(tmp_path / name)}}
            found.append(runs.parameters(runs.trained(tmp_path / f"{name}{kl['estimator']}", kl=[own])))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    for kl, vector in zip((EXACT, K2), found, strict=False):
        own = {**kl, "reference": {"use": "model", "path": plain}}
        torch.testing.assert_close(runs.parameters(runs.trained(tmp_path / f"p{kl['estimator']}", kl=[own])), vector)


# Checkpoints


@pytest.mark.parametrize("at", [1, 2])
def test_a_moving_reference_of_a_kl_is_saved_and_resumed_to_the_bit(tmp_path, at):
    kl = {**K2, "label": "slow", "reference": {"use": "ema", "decay": 0.5}}
    anchored = {**IN_REWARD, "reference": {"use": "sync", "every": 1}}
    parts = {"kl": [kl, anchored], "training": {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}}

    def state(made: Any) -> list[torch.Tensor]:
        moving = made.collector.forwards.references.moving()
        assert list(moving) == ["reference.slow", "reference.in_reward"]
        return [runs.parameters(made), *(runs.parameters(own) for _, own in moving.values())]

    whole = state(runs.trained(tmp_path, **parts))
    folder = tmp_path / f"checkpoint-{at}"
    assert (folder / "reference.slow").exists()
    made = runs.trainer(tmp_path / "again", **parts)
    made.train(resume_from_checkpoint=str(folder))
    made.close()
    for x, y in zip(state(made), whole, strict=True):
        assert torch.equal(x, y)


# Refusals


def problems(**parts: Any) -> list[str]:
    return resolve({**runs.BASE, **parts}).algorithm().problems()


def test_what_needs_the_recipes_reference_is_refused_without_one(teacher):
    other = {"use": "model", "path": teacher}
    nested = {"kl": [{**K2, "reference": other}]}
    assert problems(**nested) == []
    (said,) = problems(**nested, advantages="online_dpo", reference="none")
    assert "advantages=online_dpo needs ref_logps and nothing provides them" in said
    assert resolve({**runs.BASE, **nested, "reference": "frozen"}).algorithm().problems() == [
        "reference=frozen provides ref_logps and nothing reads them: set reference.use=none"
    ]
    raw = {key: value for key, value in runs.BASE.items() if key != "reference"}
    assert resolve({**raw, **nested}).raw["reference"]["use"] == "none"
    assert resolve({**raw, "kl": [K2, *nested["kl"]]}).raw["reference"]["use"] == "frozen"


@pytest.mark.parametrize(
    ("kl", "said"),
    [
        ({**K2, "reference": "none"}, "kl.0.reference=none provides nothing to measure kl.0=in_loss against"),
        ({**K2, "when": {}}, "kl.0=in_loss: when is empty"),
        ({**K2, "label": "rollout"}, "a KL's label must be of letters, digits"),
        ({**K2, "label": "a/b"}, "a KL's label must be of letters, digits"),
        (
            {**K2, "reference": {"use": "model", "path": "x", "device": "cpu", "offload": True}},
            "offload moves it to the",
        ),
    ],
)
def test_what_cannot_serve_is_refused(kl, said):
    found = [x for x in problems(kl=[kl, {**IN_REWARD, "reference": "frozen"}]) if said in x]
    assert len(found) == 1


def test_two_kls_of_one_label_are_refused():
    kls = [{**K2, "label": "x"}, {**IN_REWARD, "label": "x"}]
    assert any("2 KLs are called 'x'" in said for said in problems(kl=kls, reference="frozen"))


def test_a_teacher_with_another_tokenizer_is_refused_before_a_model_loads(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    path = Path(saved(tmp_path / "teacher"))
    _, own = tiny_policy()
    words = sorted(own.get_vocab(), key=own.get_vocab().get)
    words[5], words[6] = words[6], words[5]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=own.unk_token or words[0]))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for file in path.glob("*token*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=own.eos_token).save_pretrained(path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(
        ValueError, match=r"the tokenizer of .* must be the policy's, but token 5 is .* distillation across"
    ):
        runs.trainer(tmp_path / "run", kl=[{**K2, "reference": {"use": "model", "path": str(path)}}])


# The plan, the forecast and the metrics


def test_the_plan_names_each_reference_with_its_readers_and_forwards(teacher):
    other = {"use": "model", "path": teacher, "offload": True}
    kls = [{**EXACT, "label": "learn", "reference": other}, {**IN_REWARD, "reference": other}, {"use": "monitor"}]
    slow = {**K2, "label": "slow", "reference": {"use": "with_context", "of": "frozen", "context": "answer"}}
    made = runs.recipe(kl=[*kls, slow], reference="frozen", update={"epochs": 2}).algorithm()
    plan = make_plan(made, [])
    assert [line for line in plan.models if "reference" in line] == [
        "reference=frozen: read by kl.monitor (k1, token)",
        "kl.learn.reference=model, offloaded but for its phases: read by kl.learn (exact, token), kl.in_reward (k1, token)",
        "kl.slow.reference=with_context, with the model of reference: read by kl.slow (k2, token)",
    ]
    assert [line for line in plan.forwards if "reference" in line] == [
        "reference over 16 rows, without gradient",
        "kl.learn.reference over 16 rows, without gradient",
        "kl.slow.reference over 16 rows, without gradient",
        "kl.learn.reference over 32 rows in the update: whole distributions for kl.learn",
    ]


def test_the_forecast_counts_each_model_and_what_is_kept_of_it(teacher, tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=4)
    model, _ = tiny_policy()
    sampled = {"rollout": runs.SAMPLED}
    big = saved(tmp_path / "big", rows=1000)

    def parts(*kls: Any, reference: Any = "none") -> dict[str, float]:
        algorithm = runs.recipe(kl=list(kls), reference=reference, **sampled).algorithm()
        return estimate(Model(), algorithm, args, model=model, prompt_tokens=8).phases["update"]

    weights = parts()["weights"]
    found = parts({**K2, "reference": "frozen"}, {**EXACT, "label": "big", "reference": {"use": "model", "path": big}})
    assert found["reference.in_loss"] == pytest.approx(weights, rel=0.01)
    assert found["reference.big"] > 1.5 * weights
    assert found["reference.big"] == pytest.approx(
        2 * parts({**EXACT, "reference": {"use": "model", "path": big, "dtype": "bfloat16"}})["reference.in_loss"],
        rel=0.01,
    )
    policy = {"use": "with_context", "of": "policy", "context": "answer"}
    assert not any("reference" in part for part in parts({**K2, "reference": policy}))
    top = parts({**EXACT, "estimator": Top(top_k=7), "reference": "frozen"})
    assert top["reference scores"] == 16 * 5 * 7 * 8 / 2**20


def test_a_kl_with_its_own_reference_logs_and_adapts_to_its_own_distance(tmp_path, teacher):
    adaptive = {"use": "adaptive", "target": 0.5, "horizon": 100}
    kl = {**IN_REWARD, "controller": adaptive}
    rest = {"training": {"max_steps": 4}}
    outer = runs.entries(runs.trained(tmp_path / "1", kl=[kl], reference={"use": "model", "path": teacher}, **rest))
    other = {"use": "model", "path": teacher}
    made = runs.trained(tmp_path / "2", kl=[{**kl, "reference": other}, {"use": "monitor"}], reference="frozen", **rest)
    for entry, due in zip(runs.entries(made), outer, strict=True):
        assert entry.get("kl/in_reward/beta") == due.get("kl/in_reward/beta")
        if "kl/rollout/sequence" in due:
            assert entry["kl/in_reward/rollout/sequence"] == due["kl/rollout/sequence"]
            assert entry["kl/in_reward/rollout/token"] == due["kl/rollout/token"]
            assert entry["kl/rollout/sequence"] != due["kl/rollout/sequence"]
    betas = [entry["kl/in_reward/beta"] for entry in outer if "kl/in_reward/beta" in entry]
    assert len(set(betas)) == 2
    declared = {named.name for named in metrics_of(made.algorithm)}
    logged = {name for entry in runs.entries(made) for name in entry if name.startswith("kl/")}
    assert logged == {name for name in declared if name.startswith("kl/")}


# A reference that is no model


@dataclass(kw_only=True)
class Server(Reference):
    """Scores of token ids, as a server would give them: each token as likely as its id says."""

    name = "server"
    scores = frozenset({"logps", "top_logps"})
    metrics = (Metric("calls", "calls", "requests so far"),)

    def __post_init__(self) -> None:
        self._calls = 0

    def build(self, policy: Any) -> None:
        return None

    def score(self, rows: ReferenceRows, needs: frozenset[str], top_k: int | None = None) -> dict[str, Any]:
        self._calls += 1
        log_probs = torch.linspace(0, -3, 120).log_softmax(0)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in rows.completion_ids], batch_first=True)
        found = {"logps": log_probs[ids] * rows.mask}
        if top_k is not None:
            size = (*rows.mask.shape, top_k)
            found["top_logps"], found["top_ids"] = log_probs[:top_k].expand(size), torch.arange(top_k).expand(size)
        return {name: x for name, x in found.items() if name in needs or name == "top_ids"}

    def report(self) -> dict[str, float]:
        return {"calls": float(self._calls)}


def test_a_reference_may_score_rows_without_a_model(tmp_path):
    kls = [{**K2, "reference": Server()}, {**EXACT, "label": "top", "estimator": Top(top_k=3), "reference": Server()}]
    made = runs.trained(tmp_path / "1", kl=[*kls, {"use": "monitor"}], reference="frozen")
    assert list(made.collector.forwards.references.scorers) == ["", "in_loss"]
    (entry,) = [entry for entry in runs.entries(made) if "reference/server/calls" in entry]
    assert entry["reference/server/calls"] == 1
    assert entry["kl/in_loss/k2"] > 0
    assert entry["kl/top/exact"] > 0
    with pytest.raises(
        ValueError, match=r"reads distributions of the reference, and kl\.0\.reference=server gives logps, top"
    ):
        runs.trainer(tmp_path / "2", kl=[{**EXACT, "reference": Server()}])
