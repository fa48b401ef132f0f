"""References that read the rows behind another prompt: hints, and contexts that depend on the rewards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_rlhf.config.recipe import resolve
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs

EXACT, K2 = ({"use": "in_loss", "beta": 1.0, "estimator": x} for x in ("exact", "k2"))
EXACT_IN_REWARD = {"use": "in_reward", "beta": 0.5, "estimator": "exact"}
KLS = {"exact": EXACT, "k2": K2, "in_reward": {"use": "in_reward", "beta": 0.5}, "exact in_reward": EXACT_IN_REWARD}


REST = {"update": {"mini_batches": 2, "epochs": 2}, "training": {"max_steps": 6}}
UNHINTED = [row | {"hint": None} for row in runs.problems(4)]


def hinted() -> list[dict[str, Any]]:
    return [row | {"hint": f"it is {row['answer']}" if i % 2 else None} for i, row in enumerate(runs.problems(4))]


def behind(of: Any = "frozen", context: Any = "hint", **more: Any) -> dict[str, Any]:
    return {"use": "with_context", "of": of, "context": context, **more}


@pytest.mark.parametrize("kl", KLS.values(), ids=KLS)
@pytest.mark.parametrize("of", ["frozen", {"use": "ema", "decay": 0.5}], ids=["frozen", "ema"])
def test_without_a_context_it_is_the_reference_to_the_bit(tmp_path, kl, of):
    """A row whose context is None keeps its prompt."""
    found = runs.trained(tmp_path / "1", kl=[{**kl, "reference": behind(of)}], data=UNHINTED, **REST)
    plain = runs.trained(tmp_path / "2", kl=[{**kl, "reference": of}], data=UNHINTED, **REST)
    assert torch.equal(runs.parameters(found), runs.parameters(plain))


@pytest.mark.parametrize("kl", KLS.values(), ids=KLS)
def test_the_policy_behind_its_own_prompt_is_at_no_distance(tmp_path, kl):
    """In the first step of each rollout, and over whole distributions in the loss in every step."""
    entries = runs.entries(runs.trained(tmp_path, kl=[{**kl, "reference": behind("policy")}], data=UNHINTED, **REST))
    distance = f"kl/{kl['use']}/{kl.get('estimator', 'k1')}"
    every = kl is EXACT
    assert all(abs(entry[distance]) < 1e-6 for entry in (entries if every else entries[::4]))
    assert every or kl["use"] == "in_reward" or abs(entries[3][distance]) > 1e-6, (
        "the policy moves away from the rollout's"
    )


def test_its_log_probs_are_those_behind_the_prompt_with_the_hint(tmp_path):
    for template in ("{prompt}\n\n{context}", "{context}: {prompt}"):
        made = runs.trainer(
            tmp_path / template[:4], kl=[{**K2, "reference": behind(template=template)}], data=hinted(), update={}
        )
        buffer = made.collector.collect(0)
        made.close()
        tokenizer, rows = made.processing_class, buffer.rows
        for i, text in enumerate(buffer.extra["texts"]["prompt"]):
            hint = next(row["hint"] for row in hinted() if row["prompt"] == text)
            asked = text if hint is None else template.format(prompt=text, context=hint)
            batch = TokenBatch(
                [tokenizer(asked).input_ids],
                [buffer.completion_ids[i]],
                rows["mask"][i : i + 1, : len(buffer.completion_ids[i])],
                0,
            )
            due = made.collector.forwards.references.scorers["in_loss"](batch)
            torch.testing.assert_close(rows["ref_logps:in_loss"][i : i + 1, : due.size(1)], due)
            assert buffer.prompts["in_loss"][i] == tokenizer(asked).input_ids


@pytest.mark.proves("reference.with_context", "reference.policy", how="closed form", tolerance="1e-12")
def test_the_step_is_that_of_the_exact_gradient_to_the_policy_with_the_hint(tmp_path):
    """Completions of one token, `exact`, and the policy itself as the teacher: no sampling remains, and it has no gradient."""
    one = {"use": "generate", "prompts": 4, "num_generations": 2, "max_new_tokens": 1}
    parts = {"kl": [{**EXACT, "reference": behind("policy")}], "rollout": one, "rewards": [], "update": {}}
    data = hinted()
    made = runs.trainer(
        tmp_path, **parts, advantages="leave_one_out", training={"max_steps": 1}, data=data, dtype=torch.float64
    )
    policy, total = made.actor_critic.policy, torch.zeros((), dtype=torch.float64)

    def log_probs(text: str) -> torch.Tensor:
        ids = torch.tensor([made.processing_class(text).input_ids])
        return policy(ids).logits[0, -1].log_softmax(-1)

    for row in data:
        asked = row["prompt"] if row["hint"] is None else f"{row['prompt']}\n\n{row['hint']}"
        p, q = log_probs(row["prompt"]), log_probs(asked).detach()
        total = total + (p.exp() * (p - q)).sum() / len(data)
    gradient = torch.autograd.grad(total, list(policy.parameters()))
    expected = runs.parameters(made) - 0.1 * torch.cat([x.flatten() for x in gradient])
    assert float((expected - runs.parameters(made)).abs().max()) > 1e-4
    made.train()
    made.close()
    torch.testing.assert_close(runs.parameters(made), expected, rtol=0, atol=1e-12)


ASKED: list[Any] = []


def best_sibling(rollouts: Any, scores: Any) -> list[str | None]:
    """The best other completion of a row's group, where it is better than the row's own."""
    ASKED.append(scores)
    found: list[str | None] = []
    for i, group in enumerate(rollouts.group_ids):
        others = [(scores["total"][j], j) for j, g in enumerate(rollouts.group_ids) if g == group and j != i]
        score, j = max(others)
        found.append(rollouts.completions[j] if score > scores["total"][i] else None)
    return found


@pytest.mark.parametrize("kl", KLS.values(), ids=KLS)
def test_a_context_that_needs_scores_is_asked_after_the_rewards(tmp_path, kl):
    ASKED.clear()
    made = runs.trainer(tmp_path, kl=[{**kl, "reference": behind(context=best_sibling)}])
    buffer = made.collector.collect(0)
    made.train()
    made.close()
    assert list(ASKED[0]) == ["early", "total"]
    assert set(ASKED[0]["total"]) == {0.0, 1.0}
    better = [len(x) > len(y) for x, y in zip(buffer.prompts[kl["use"]], buffer.prompt_ids, strict=True)]
    scores = buffer.extra["numbers"]["reward/total"].tolist()
    assert any(better)
    assert all(score == 0 for score, longer in zip(scores, better, strict=True) if longer)
    with pytest.raises(ValueError, match="needs scores and rewards is empty"):
        runs.trainer(tmp_path, kl=[{**kl, "reference": behind(context=best_sibling)}], rewards=[])


def test_one_model_serves_with_and_without_a_context(tmp_path):
    kls = [{**K2, "reference": behind()}, {**EXACT_IN_REWARD, "label": "other", "reference": behind("ema")}]
    made = runs.trainer(tmp_path, kl=[*kls, {"use": "in_advantage"}], reference="frozen", data=hinted())
    made.close()
    references = made.collector.forwards.references
    assert list(references.models) == ["reference", "reference.other"]
    assert references.scorers["in_loss"].own is references.scorers[""].own
    assert list(references.moving()) == ["reference.other"]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_it_resumes_to_the_bit_within_a_rollout(tmp_path, at):
    moving = {"use": "ema", "decay": 0.5}
    parts = {"kl": [{**EXACT, "label": "hinted", "reference": behind(moving)}], "data": hinted()}
    parts |= {"training": {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}}
    whole = runs.trained(tmp_path, **parts)
    made = runs.trainer(tmp_path / "again", **parts)
    made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    made.close()
    assert torch.equal(runs.parameters(made), runs.parameters(whole))
    (own,), (due,) = (x.collector.forwards.references.moving().values() for x in (made, whole))
    assert torch.equal(runs.parameters(own[1]), runs.parameters(due[1]))


def test_filters_take_the_prompts_along(tmp_path):
    filters = [{"use": "zero_variance", "resample": 3}]
    made = runs.trainer(tmp_path, kl=[{**EXACT, "reference": behind()}], data=hinted(), filters=filters)
    buffer = made.collector.collect(0)
    made.train()
    made.close()
    for ids, longer in zip(buffer.prompt_ids, buffer.prompts["in_loss"], strict=True):
        assert longer[: len(ids)] == ids


def test_a_chats_context_is_in_the_last_message_of_the_user(tmp_path):
    _, tokenizer = tiny_policy()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}:{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}[a:{% endif %}"
    )
    rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in hinted()]
    made = runs.trainer(
        tmp_path, kl=[{**K2, "reference": behind(template="{context} {prompt}")}], data=rows, tokenizer=tokenizer
    )
    buffer = made.collector.collect(0)
    made.close()
    for message, ids in zip(buffer.extra["texts"]["prompt"], buffer.prompts["in_loss"], strict=True):
        text = message[0]["content"]
        hint = next(row["hint"] for row in hinted() if row["prompt"] == text)
        asked = text if hint is None else f"{hint} {text}"
        assert ids == tokenizer(f"[u:{asked}][a:", add_special_tokens=False).input_ids


# Refusals


def problems(reference: Any, **parts: Any) -> str:
    return "\n".join(resolve({**runs.BASE, "kl": [{**K2, "reference": reference}], **parts}).algorithm().problems())


def test_what_cannot_serve_is_refused(tmp_path):
    assert "the KL of the policy to itself is 0" in problems("policy")
    assert "of=none provides no log-probs" in problems(behind("none"))
    assert "of must be a reference that reads its rows" in problems(behind(behind()))
    assert problems(behind("policy")) == ""
    with pytest.raises(UserError, match=r"template must contain \{prompt\} and \{context\}"):
        problems(behind(template="{prompt}"))
    with pytest.raises(ValueError, match=r"there is no hnt|reads hnt.*Did you mean 'hint'"):
        runs.trainer(tmp_path, kl=[{**K2, "reference": behind(context="hnt")}], data=hinted())
    with pytest.raises(UserError, match="has no function"):
        problems(behind(context="tests.helpers.runs:nothing"))


def short(rollouts: Any) -> list[str]:
    return ["x"]


def long(rollouts: Any) -> list[str]:
    return ["x" * 10_000] * len(rollouts)


def test_what_a_function_returns_wrongly_is_named(tmp_path):
    made = runs.trainer(tmp_path, kl=[{**K2, "reference": behind(context=short)}])
    with pytest.raises(ValueError, match=r"must return one text or None for each of 16 rows, got 1"):
        made.train()
    made.close()
    made = runs.trainer(tmp_path / "long", kl=[{**K2, "reference": behind(context=long)}])
    with pytest.raises(UserError, match=r"must fit into the model's context of \d+ tokens, got 10\d+"):
        made.train()
    made.close()
