"""The reference `remote` against a server that speaks as vLLM does: equal to the same model in the training's process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import ReferenceRows
from hf_rlhf.testing import conformance, tiny_policy
from hf_rlhf_plugins import _http
from hf_rlhf_plugins._http import HttpError
from tests.helpers import runs
from tests.helpers.runs import parameters
from tests.helpers.servers import Raw
from tests.helpers.vllm_stub import context
from tests.helpers.vllm_teacher import COMPLETIONS, DETOKENIZE, Teacher

ROWS = [([3, 5], [7, 9, 11]), ([4], [8]), ([6, 7, 8], [9, 3])]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_http, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def teacher(*args: Any, **settings: Any) -> Teacher:
    return Teacher(*tiny_policy(seed=1), *args, **settings)


def ready(server: Teacher, **settings: Any) -> Any:
    plugin = load_plugin("reference", "remote", url=server.url, request_retries=1, **settings)
    assert list(plugin.token_problems(tiny_policy()[1])) == []
    plugin.setup(context())
    return plugin


def asked(plugin: Any, needs: set[str], k: int | None = None) -> dict[str, Any]:
    mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    prompts, completions = zip(*ROWS, strict=True)
    rows = ReferenceRows(
        prompt_ids=prompts, completion_ids=completions, mask=mask, temperature=1.0, by_model=lambda *_: {}
    )
    found: dict[str, Any] = plugin.score(rows, frozenset(needs), k)
    return found


def test_scores_are_those_of_the_model_0_off_the_mask_and_the_likeliest_tokens_fall():
    with teacher() as server:
        found = asked(ready(server), {"logps", "top_logps"}, 4)
        only = asked(ready(server), {"logps"})
    assert set(only) == {"logps"}
    assert set(found) == {"logps", "top_logps", "top_ids"}
    for i, (prompt, completion) in enumerate(ROWS):
        with torch.no_grad():
            logits = server.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1)
        for j, token in enumerate(completion):
            on = not (i == 0 and j == 1)
            best = logps[j].topk(4)
            assert found["logps"][i, j].item() == pytest.approx(logps[j, token].item() * on, abs=1e-6)
            assert found["top_logps"][i, j].tolist() == pytest.approx((best.values * on).tolist(), abs=1e-6)
            assert found["top_ids"][i, j].tolist() == (best.indices * on).tolist()
    assert torch.equal(found["logps"], only["logps"])
    assert not found["logps"][1, 1:].any()


KLS = [
    {"use": "in_loss", "estimator": "k2"},
    {"use": "in_loss", "estimator": "k3"},
    {"use": "in_loss", "estimator": "abs"},
    {"use": "in_advantage", "estimator": "k1"},
    {"use": "in_loss", "estimator": {"use": "exact", "top_k": 4}},
]


def trained(folder: Path, reference: Any, kl: Any) -> Any:
    made = runs.trainer(
        folder, kl=[{"beta": 0.5, **kl}], reference=reference, training={"max_steps": 2, "learning_rate": 2.0}
    )
    made.train()
    made.close()
    return parameters(made)


@pytest.mark.proves("reference.remote", how="invariance", tolerance="1e-5")
@pytest.mark.parametrize("kl", KLS, ids=lambda kl: str(kl["estimator"]))
def test_a_run_against_it_is_the_run_against_the_model_itself(tmp_path, kl):
    for part in tiny_policy(seed=1):
        part.save_pretrained(tmp_path / "teacher")
    here = trained(tmp_path / "here", {"use": "model", "path": str(tmp_path / "teacher")}, kl)
    with teacher() as server:
        there = trained(tmp_path / "there", {"use": "remote", "url": server.url}, kl)
        rows = [request for request in server.requests if request.path == COMPLETIONS]
    none = trained(tmp_path / "none", "frozen", kl)
    assert len(rows) > 8, "one for each row"
    assert (here - there).abs().max() < 1e-5
    assert (here - none).abs().max() > 1e-3, "the teacher matters"


def test_whole_distributions_another_temperature_and_a_key_that_is_missing_are_refused(tmp_path):
    with teacher() as server:
        far = {"use": "remote", "url": server.url}
        with pytest.raises(
            ValueError, match="reads distributions of the reference, and reference=remote gives logps, top_logps"
        ):
            trained(tmp_path / "exact", far, {"use": "in_loss", "estimator": "exact"})
        with pytest.raises(ValueError, match=r"rollout.temperature is 0.7. Set rollout.temperature=1"):
            runs.trainer(tmp_path / "warm", kl=["in_loss"], reference=far, rollout={**runs.SAMPLED, "temperature": 0.7})
        with pytest.raises(ValueError, match="environment variable NO_SUCH_KEY is not set"):
            trained(tmp_path / "key", {**far, "token_env": "NO_SUCH_KEY"}, {"use": "in_loss"})


def test_what_the_server_does_not_offer_is_said_before_the_first_rollout(tmp_path):
    with teacher(max_logprobs=3) as server, pytest.raises(ValueError, match=r"max allowed.*with --max-logprobs 4"):
        trained(tmp_path / "top", {"use": "remote", "url": server.url}, KLS[-1])
    with teacher(max_model_len=4) as server:
        parts = {"reference": {"use": "remote", "url": server.url}, "rollout": runs.SAMPLED}
        with pytest.raises(ValueError, match=r"a context of 4 tokens.*--max-model-len"):
            runs.trainer(tmp_path / "long", kl=["in_loss"], **parts)


def test_a_server_that_is_down_or_has_another_model_or_tokenizer_is_refused_before_a_model_loads():
    tokenizer = tiny_policy()[1]

    def problems(**settings: Any) -> str:
        (found,) = load_plugin("reference", "remote", **settings).token_problems(tokenizer)
        return str(found)

    assert "does not answer as vLLM does (ConnectError" in problems(url="http://127.0.0.1:9", request_retries=0)
    with teacher() as server:
        assert "has no model 'third', but other, teacher" in problems(url=server.url, model="third")
        server.trouble = lambda route, body, number: {"prompt": "other"} if route == DETOKENIZE else None
        assert "must be the policy's" in problems(url=server.url)
        server.trouble = lambda route, body, number: Raw(b"out of range", 400) if route == DETOKENIZE else None
        assert f"does not know the policy's {len(tokenizer)} tokens" in problems(url=server.url)
        server.trouble = lambda route, body, number: Raw(b"", 404) if route == DETOKENIZE else None
        assert list(load_plugin("reference", "remote", url=server.url).token_problems(tokenizer)) == []


HALF = {
    "no places": lambda places: places.clear(),
    "a place is missing": lambda places: places.pop(),
    "the token is missing": lambda places: places[-1].clear(),
    "a log-prob is no number": lambda places: next(iter(places[-1].values())).update(logprob=None),
}


@pytest.mark.parametrize("change", HALF.values(), ids=HALF)
def test_half_an_answer_is_asked_for_again_and_never_used(change):
    with teacher() as server:
        plugin = ready(server)
        whole = asked(plugin, {"logps"})["logps"]
        asks = len(server.requests)

        def half(route: str, body: Any, number: int) -> Any:
            found = server.scores(body["prompt"], body["prompt_logprobs"])
            change(found["choices"][0]["prompt_logprobs"])
            return found

        server.trouble = lambda *request: half(*request) if request[2] < asks + 2 else None
        assert torch.equal(asked(plugin, {"logps"})["logps"], whole)
        server.trouble = half
        with pytest.raises(HttpError, match="an incomplete answer"):
            asked(plugin, {"logps"})


def test_a_request_that_fails_is_asked_again_and_one_that_always_does_ends_with_what_it_said(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    with teacher() as server:
        plugin = ready(server, token_env="SOME_KEY", request_timeout=2.0)
        whole, asks = asked(plugin, {"logps"})["logps"], len(server.requests)
        server.trouble = lambda route, body, number: Raw(status=503) if number < asks + 1 else None
        assert torch.equal(asked(plugin, {"logps"})["logps"], whole)
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer s3cret"}
        server.trouble = lambda route, body, number: Raw(b"CUDA out of memory", 500)
        with pytest.raises(HttpError, match=r"HTTP 500: 'CUDA out of memory' \(tried 2 times\)"):
            asked(plugin, {"logps"})
        server.trouble = lambda route, body, number: time.sleep(3.0)
        with pytest.raises(HttpError, match="no answer within 2 s"):
            asked(plugin, {"logps"})


def test_it_conforms_with_a_server_behind_it():
    with teacher() as server:
        for fact in conformance(ready(server)):
            fact()
