"""The engine `vllm` against a server that speaks as vLLM does: agreement, settings, checks, and servers that fail."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.axes import Weights
from hf_rlhf.batch import Prompt
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.testing import conformance, tiny_policy
from hf_rlhf_plugins import _http
from hf_rlhf_plugins._http import HttpError
from hf_rlhf_plugins.rollout._vllm_child import Serve
from tests.helpers.servers import Raw
from tests.helpers.vllm_stub import GENERATE, ROUTES, Stub, context

PROMPTS = [Prompt(ids=[40 + i, 41, 42], prompt="x") for i in range(3)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_http, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def policy(version: str = "run:0") -> Policy:
    model, tokenizer = tiny_policy()
    return Policy(
        model=model.eval(), tokenizer=tokenizer, device=torch.device("cpu"), wants_logps=True, version=version
    )


def send(engine: Any, own: Policy, version: str | None = None) -> None:
    own.version = version or own.version
    engine.load(Weights(policy=own, named=lambda: iter(own.model.state_dict().items())))


def ready(server: Stub, own: Policy | None = None, **settings: Any) -> Any:
    """An engine that is set up, and has sent weights if there is a policy."""
    engine = load_plugin("rollout", "vllm", **{"url": server.url, "max_new_tokens": 6, **settings})
    for plugin in (engine, engine.sync):
        plugin.setup(context())
    if own is not None:
        send(engine, own)
    return engine


def sample(engine: Any, own: Policy, generations: int = 2, temperature: float | None = None, seed: int = 0) -> Any:
    with torch.no_grad(), seeded("sampled", seed):
        return engine(own, PROMPTS, generations, temperature=temperature)


def gap(own: Policy, out: Any, temperature: float = 1.0) -> float:
    worst = 0.0
    for row, (ids, logps) in enumerate(zip(out.ids, out.logps, strict=True)):
        prompt = PROMPTS[row * len(PROMPTS) // len(out.ids)].ids
        with torch.no_grad():
            logits = own.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
        due = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, (due - torch.tensor(logps)).abs().max().item())
    return worst


def move(own: Policy, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.proves("rollout.vllm", how="invariance", tolerance="1e-5")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_samples_from_the_weights_that_were_sent_and_reports_their_log_probs(tmp_path, temperature):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own)
        first = sample(engine, own, temperature=temperature)
        move(own)
        send(engine, own, "run:1")
        moved = sample(engine, own, temperature=temperature)
    assert gap(own, moved, temperature) < 1e-5 < gap(own, first, temperature)
    assert first.ids != moved.ids
    assert {len(row) for row in moved.ids} <= set(range(1, 7))


def test_it_conforms_with_a_server_behind_it(tmp_path):
    with Stub(tmp_path / "model") as server:
        for fact in conformance(ready(server)):
            fact()


def test_equal_seeds_of_the_core_give_equal_tokens_and_no_two_prompts_share_one(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own)
        first, again, other = (sample(engine, own, seed=seed) for seed in (0, 0, 1))
        seeds = [body["sampling_params"]["seed"] for body in server.sent(GENERATE)[-9:]]
    assert first == again != other
    assert sorted(seeds[:3]) == sorted(seeds[3:6])
    assert len(set(seeds)) == 6
    assert min(abs(a - b) for a in seeds[:3] for b in seeds[6:]) > 2, "rows of a prompt have adjacent seeds"


def test_greedy_completions_are_asked_for_once_and_repeated(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        out = sample(ready(server, own), own, 3, temperature=0.0)
        assert {body["sampling_params"]["n"] for body in server.sent(GENERATE)[1:]} == {1}
    assert out.logps is None
    assert [out.ids[i] for i in (0, 3, 6)] == [out.ids[i] for i in (2, 5, 8)]


def test_prompts_go_to_several_servers_in_turn_and_weights_to_all(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as one, Stub(tmp_path / "model") as two:
        engine = load_plugin("rollout", "vllm", url=[one.url, two.url], max_new_tokens=6)
        engine.setup(context())
        send(engine, own)
        both = sample(engine, own)
        asked = [[body["token_ids"] for body in server.sent(GENERATE)[1:]] for server in (one, two)]
        alone = sample(ready(one, own), own)
    assert asked == [[PROMPTS[0].ids, PROMPTS[2].ids], [PROMPTS[1].ids]] or asked[0] == [PROMPTS[2].ids, PROMPTS[0].ids]
    assert both == alone, "which server answers changes nothing"


def test_a_prompts_own_bound_is_kept(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own)
        out = engine(own, [Prompt(ids=[40], prompt="x", max_new_tokens=2)], 4)
    assert max(map(len, out.ids)) == 2


@pytest.mark.parametrize(
    ("setting", "value", "sent"),
    [
        ("top_p", 0.9, {"top_p": 0.9}),
        ("top_k", 5, {"top_k": 5}),
        ("min_p", 0.1, {"min_p": 0.1}),
        ("repetition_penalty", 1.2, {"repetition_penalty": 1.2}),
        ("stop_strings", ["a"], {"stop": ["a"], "include_stop_str_in_output": True, "detokenize": True}),
    ],
)
def test_sampling_settings_reach_the_server(tmp_path, setting, value, sent):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own, **{setting: value})
        out = sample(engine, own)
        body = server.sent(GENERATE)[-1]["sampling_params"]
    assert sent.items() <= body.items()
    full = setting == "stop_strings"
    assert ("sampler_logps" in engine.provides) is (out.logps is not None) is ("logprobs" in body) is full


def test_the_key_comes_from_the_environment_and_goes_with_each_request(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own, token_env="SOME_KEY")
        sample(engine, own)
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer s3cret"}
    assert "s3cret" not in str(vars(engine))
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ValueError, match="environment variable SOME_KEY is not set"):
        engine.setup(context())


@pytest.mark.parametrize(
    ("unsteady", "said"), [(0.0, "a resumed run is bit-identical"), (1e-7, "with what else is in a batch")]
)
def test_the_plan_says_whether_the_server_repeats_itself_in_another_batch(tmp_path, unsteady, said):
    with Stub(tmp_path / "model", unsteady=unsteady) as server:
        server.paused = True
        engine = ready(server)
        assert server.paused is False, "a run that was killed left it held"
        assert server.trials == 12
    assert [said in remark for remark in engine._found] == [True]


def test_servers_in_sleep_mode_wake_for_a_rollout_and_sleep_after_it(tmp_path):
    own = policy()
    with Stub(tmp_path / "model", enable_sleep_mode=True) as server, Stub(tmp_path / "model") as awake:
        engine = load_plugin("rollout", "vllm", url=[server.url, awake.url], max_new_tokens=6)
        engine.setup(context())
        engine.wake("weights")
        send(engine, own)
        engine.wake("cache")
        sample(engine, own)
        engine.sleep()
        asked = [request.path for request in server.requests if request.path != GENERATE]
        assert not [request for request in awake.requests if "sleep" in request.path or "wake" in request.path]
    loads = ["/pause?mode=wait", "/collective_rpc", "/update_weight_version", "/resume"]
    asked = asked[asked.index("/wake_up?tags=weights") :]
    assert asked == ["/wake_up?tags=weights", *loads, "/wake_up?tags=kv_cache", "/sleep?level=1"]


@pytest.mark.parametrize(
    ("url", "serve", "said"),
    [
        ("http://there:8000", {}, "url names http://there:8000"),
        (["http://localhost:1", "http://localhost:2"], {"devices": [0, 1, 2]}, "as many for each of 2 servers, got 3"),
        ("http://localhost:1", {"devices": []}, "got 0"),
    ],
)
def test_servers_that_cannot_be_started_are_refused_by_the_plan(url, serve, said):
    engine = load_plugin("rollout", "vllm", url=url, serve={"python": "p", **serve})
    assert [said in problem for problem in engine.serve.problems(engine.urls)] == [True]


def test_devices_are_shared_out_and_split_a_model_unless_the_arguments_say_how():
    serve = Serve(python="p", devices=[4, 5, 6, 7], args=["--x"])
    split = ["--tensor-parallel-size", "2", "--x"]
    assert [serve.placed(i, 2) for i in (0, 1)] == [
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, split),
        ({"CUDA_VISIBLE_DEVICES": "6,7"}, split),
    ]
    assert Serve(python="p", devices=[3]).placed(0, 1) == ({"CUDA_VISIBLE_DEVICES": "3"}, [])
    assert Serve(python="p", devices=[1, 2], args=["-tp=1"]).placed(0, 1)[1] == ["-tp=1"]
    assert Serve(python="p").placed(1, 2) == ({}, [])


# Before the first rollout


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"routes": ROUTES[1:]}, "has no /inference/v1/generate: start it with --enable-scale-out"),
        ({"routes": ROUTES[:1]}, "start it with the environment variable VLLM_SERVER_DEV_MODE=1"),
        ({"logprobs_mode": "raw_logprobs"}, "start it with --logprobs-mode processed_logprobs"),
        ({"max_model_len": 12}, "start it with --max-model-len 16, or lower them"),
        (
            {"dtype": "torch.bfloat16"},
            "computes in torch.bfloat16, and the trainer in float32: start it with --dtype float32",
        ),
        ({"quantization": "fp8"}, "serves a model that is quantized"),
        ({"extension": None}, "start it with --worker-extension-cls hf_rlhf_vllm_worker.Worker"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_setup_with_the_flag_that_does(tmp_path, wrong, said):
    with Stub(tmp_path / "model", **wrong) as server, pytest.raises(ValueError, match="serve-engine") as refused:
        load_plugin("rollout", "vllm", url=server.url, max_new_tokens=6).setup(context(prompt_tokens=10))
    assert said in str(refused.value)
    assert server.url in str(refused.value)


def test_everything_that_does_not_fit_is_said_at_once(tmp_path):
    many = {"max_model_len": 12, "dtype": "torch.float16", "logprobs_mode": "raw_logits", "extension": "x.Y"}
    with Stub(tmp_path / "model", **many) as server, pytest.raises(ValueError, match="rollout=vllm") as refused:
        load_plugin("rollout", "vllm", url=[server.url, "http://127.0.0.1:9"], max_new_tokens=600).setup(context())
    said = str(refused.value)
    parts = ("--max-model-len", "--dtype", "--logprobs-mode", "--worker-extension-cls", "127.0.0.1:9 does not answer")
    assert [part for part in parts if part not in said] == []


def test_a_server_with_another_vocabulary_or_a_policy_that_cannot_be_sent_is_refused(tmp_path):
    def other(route: str, body: Any, number: int) -> Any:
        describes = route == "/collective_rpc" and body["method"] == "hf_rlhf_describe"
        return {"results": [{"vocabulary": 5, "model_type": "llama"}]} if describes else None

    with Stub(tmp_path / "model", other) as server, pytest.raises(ValueError, match="vocabulary=5"):
        ready(server)
    with Stub(tmp_path / "model") as server:
        engine = load_plugin("rollout", "vllm", url=server.url)
        with pytest.raises(ValueError, match="float64, which vLLM does not know"):
            engine.setup(context(policy=tiny_policy(dtype=torch.float64)[0]))


@pytest.mark.parametrize("url", [[], ["http://a:1", "http://a:1"], "8000", "http://user:word@a"])
def test_urls_that_name_no_server_are_refused(url):
    with pytest.raises(UserError, match="url"):
        load_plugin("rollout", "vllm", url=url)


# Servers that fail


def at(wanted: str, numbers: set[int], answer: Any) -> Any:
    """Trouble for some requests to a route; `answer` may be a function of the stub's own."""
    return lambda route, body, number: answer if route == wanted and number in numbers else None


@pytest.mark.parametrize("answer", [Raw(status=500, body=b"boom"), Raw(drop=True), Raw(body=b'{"choices": [{"ind')])
@pytest.mark.parametrize("route", [GENERATE, "/collective_rpc", "/pause", "/update_weight_version", "/resume"])
def test_a_request_that_fails_once_is_asked_again(tmp_path, route, answer):
    if answer.body.startswith(b"{"):
        answer = Raw(body=answer.body, headers={"Connection": "close", "X-Cut": "1"}, status=503)
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server)
        server.trouble = at(route, {server.counts[route], server.counts[route] + 2}, answer)
        send(engine, own)
        out = sample(engine, own)
        assert server.paused is False
    assert gap(own, out) < 1e-5


def test_a_server_that_never_answers_in_time_or_at_all_ends_with_what_it_said(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own, request_timeout=0.5, request_retries=1)
        server.trouble = lambda route, body, number: time.sleep(1.0)
        with pytest.raises(HttpError, match=r"no answer within 0.5 s \(tried 2 times\)"):
            sample(engine, own)
        server.trouble = lambda route, body, number: Raw(status=500, body=b"CUDA out of memory")
        with pytest.raises(HttpError, match=r"HTTP 500: 'CUDA out of memory' \(tried 2 times\)"):
            sample(engine, own)
    with pytest.raises(HttpError, match=r"Connect.*\(tried 2 times\)"):
        sample(engine, own)


def half(change: Any) -> Any:
    def trouble(server: Stub) -> Any:
        def answer(route: str, body: Any, number: int) -> Any:
            if route != GENERATE:
                return None
            found = server._generate(body["token_ids"], body["sampling_params"])
            change(found["choices"])
            return found

        return answer

    return trouble


HALF = {
    "a row is missing": lambda choices: choices.pop(),
    "a row is empty": lambda choices: choices[0]["token_ids"].clear(),
    "log-probs are missing": lambda choices: choices[0].update(logprobs=None),
    "a log-prob is missing": lambda choices: choices[0]["logprobs"]["content"].pop(),
    "a log-prob is no number": lambda choices: choices[0]["logprobs"]["content"][0].update(logprob=None),
    "a row was aborted": lambda choices: choices[0].update(finish_reason="abort"),
    "no version": lambda choices: choices[0].update(weight_versions=None),
}


@pytest.mark.parametrize("change", HALF.values(), ids=HALF)
def test_half_an_answer_is_asked_for_again_and_never_used(tmp_path, change):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine, own.version = ready(server, own), "run:0"
        whole = sample(engine, own)
        before = server.counts[GENERATE]
        trouble = half(change)(server)
        server.trouble = lambda *request: trouble(*request) if request[2] < before + 3 else None
        assert sample(engine, own) == whole
        assert server.counts[GENERATE] == before + 6
        server.trouble = trouble
        with pytest.raises(HttpError, match=r"incomplete|ended by abort"):
            sample(engine, own)


def test_a_server_that_was_started_again_gets_the_weights_again(tmp_path):
    own = policy()
    move(own)
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own)
        whole = sample(engine, own)
        loads = len(server.sent("/update_weight_version"))
        server.restart()
        assert sample(engine, own) == whole
        assert len(server.sent("/update_weight_version")) == loads + 1, "once, not once for each prompt"


def test_a_server_that_is_started_again_while_it_loads_never_gets_the_name_of_weights_that_it_lost(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server)
        move(own)
        before = server.counts["/update_weight_version"]

        def falls(route: str, body: Any, number: int) -> Any:
            if route != "/update_weight_version" or number != before:
                return None
            server.restart()
            return Raw(drop=True)

        server.trouble = falls
        send(engine, own, "run:1")
        assert gap(own, sample(engine, own)) < 1e-5


def test_weights_of_another_run_are_never_sampled_from(tmp_path):
    own = policy()

    def other(route: str, body: Any, number: int) -> Any:
        if route == "/resume":
            server.version = "other:7"
        return None

    with Stub(tmp_path / "model") as server:
        engine = ready(server, own)
        server.trouble = other
        server.version = "other:6"
        with pytest.raises(HttpError, match="sampled from the weights other:7, not from run:0"):
            sample(engine, own)


def test_a_server_that_loads_only_half_of_the_weights_is_found_by_the_probe_of_the_load(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own)
        move(own)
        server.trouble = lambda route, body, number: {"results": [{}]} if route == "/collective_rpc" else None
        with pytest.raises(
            RuntimeError, match=r"after the weights run:1 were loaded, log-probs .* did not load all of them"
        ):
            send(engine, own, "run:1")


def test_weights_that_a_server_cannot_load_end_with_its_reason_and_let_it_go_on(tmp_path):
    with Stub(tmp_path / "model") as server:
        engine = ready(server)
        refusal = {"results": [{}, {"error": "ValueError: no lm_head"}]}
        server.trouble = lambda route, body, number: refusal if route == "/collective_rpc" else None
        with pytest.raises(HttpError, match=r"cannot load the weights: ValueError: no lm_head"):
            send(engine, policy())
        assert server.paused is False


def test_folders_of_weights_are_deleted(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own, sync={"use": "folder", "path": str(tmp_path / "weights")})
        first = set((tmp_path / "weights").iterdir())
        send(engine, own, "run:1")
        second = set((tmp_path / "weights").iterdir())
        assert len(first) == len(second) == 1
        assert first != second
        engine.sync.close()
    assert not list((tmp_path / "weights").iterdir())


def test_weights_of_a_run_that_was_killed_are_removed_by_the_next_one_and_no_others(tmp_path):
    folder, own = tmp_path / "weights", policy()
    gone, here = subprocess.Popen(["true"]), socket.gethostname()
    gone.wait()
    owners = {"killed": f"{here} {gone.pid}", "alive": f"{here} {os.getpid()}", "elsewhere": f"x{here} {gone.pid}"}
    for name, owner in {**owners, "odd": "?"}.items():
        (folder / f"hf_rlhf-{name}").mkdir(parents=True)
        (folder / f"hf_rlhf-{name}" / "owner").write_text(owner)
    (folder / "hf_rlhf-unmarked").mkdir()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own, sync={"use": "folder", "path": str(folder)})
        engine.sync.close()
    left = {path.name.removeprefix("hf_rlhf-") for path in folder.iterdir()}
    assert left == {"alive", "elsewhere", "odd", "unmarked"}


def gaps(engine: Any, *means: float) -> None:
    for mean in means:
        engine.observe({"rollout/sampler_gap/mean": mean})


def test_a_gap_beyond_the_bound_ends_the_run_in_float32(tmp_path):
    with Stub(tmp_path / "model") as server:
        strict, loose = ready(server), ready(server, max_sampler_gap=None)
    for engine in (strict, loose):
        gaps(engine, 0.05)
        engine.observe({})
    gaps(loose, 1.0)
    assert (loose.report(), strict.report()) == ({}, {"sampler_gap/limit": 0.05})
    with pytest.raises(RuntimeError, match=r"differ by 0.051 nats per token, more than rollout.max_sampler_gap=0.05"):
        gaps(strict, 0.051)


@pytest.mark.parametrize(("first", "limit"), [(0.01, 0.03), (0.05, 0.15), (1e-6, 1e-3)])
def test_in_half_precision_the_first_rollout_sets_the_limit_of_the_others(tmp_path, first, limit):
    with Stub(tmp_path / "model", dtype="torch.bfloat16") as server:
        engine = load_plugin("rollout", "vllm", url=server.url, max_new_tokens=6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine.setup(context())
    assert engine.report() == {}
    assert any("compared in half precision" in remark for remark in engine._found)
    gaps(engine, first, limit)
    assert engine.report() == {"sampler_gap/limit": pytest.approx(limit)}
    with pytest.raises(RuntimeError, match="more than its limit, three times that of the first rollout"):
        gaps(engine, 1.01 * limit)


def test_in_half_precision_the_first_rollout_is_compared_with_the_setting(tmp_path):
    with Stub(tmp_path / "model", dtype="torch.bfloat16") as server:
        engine = load_plugin("rollout", "vllm", url=server.url, max_new_tokens=6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine.setup(context())
    with pytest.raises(RuntimeError, match=r"more than rollout.max_sampler_gap=0.05"):
        gaps(engine, 0.06)


@pytest.mark.parametrize(("why", "said"), [("experts", "is a mixture of experts"), ("cache", "in 8 bits")])
def test_mixtures_of_experts_and_8_bit_caches_only_warn(tmp_path, caplog, why, said):
    model, _ = tiny_policy()
    with Stub(tmp_path / "model", cache_dtype="fp8_e5m2" if why == "cache" else "auto") as server:
        if why == "experts":
            model.config.num_experts = 8
        engine = load_plugin("rollout", "vllm", url=server.url, max_new_tokens=6)
        engine.setup(context(policy=model))
    gaps(engine, 0.01, 0.2, 0.3)
    assert sum(said in remark for remark in engine._found) == 1
    assert len([x for x in caplog.records if said in x.getMessage()]) == 1, "once, not in every rollout"


@pytest.mark.parametrize("temperature", [None, 0.0])
def test_completions_land_prompt_by_prompt_while_others_are_sampled(tmp_path, temperature):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own)
        whole = sample(engine, own, temperature=temperature)
        held = threading.Event()
        slow = PROMPTS[0].ids

        def trouble(route: str, body: Any, number: int) -> Any:
            if route == GENERATE and body["token_ids"] == slow:
                held.wait(10)

        server.trouble = trouble
        with torch.no_grad(), seeded("sampled", 0):
            pending = engine.start(own, PROMPTS, 2, temperature=temperature)
        parts = iter(pending)
        landed = dict([next(parts), next(parts)])
        assert 0 not in landed, "the first prompt is still being sampled"
        held.set()
        landed |= dict(parts)
        assert pending.result() == whole
    for i, part in landed.items():
        assert part == whole.select(slice(2 * i, 2 * i + 2))
    assert whole.versions == ["run:0"] * 6


def test_an_answer_that_never_lands_ends_the_wait_with_its_error(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        engine = ready(server, own, request_retries=0)
        server.trouble = at(GENERATE, {server.counts[GENERATE] + 1}, Raw(status=500, body=b"boom"))
        pending = engine.start(own, PROMPTS, 2)
        with pytest.raises(HttpError, match="boom"):
            list(pending)
        with pytest.raises(HttpError, match="boom"):
            pending.result()
