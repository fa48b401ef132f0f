"""Transports of weights to servers that speak as vLLM's worker extension does: what arrives, and what is lost on the way."""

from __future__ import annotations

import ast
import asyncio
import copy
import json
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rlhf import load_plugin
from hf_rlhf.axes import Weights
from hf_rlhf.batch import Prompt
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.testing import tiny_policy
from hf_rlhf_plugins import _http
from hf_rlhf_plugins.sync import _transfer, gloo
from tests.helpers.paths import ROOT
from tests.helpers.vllm_stub import Stub, context

TRANSPORTS = ("folder", "gloo")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_http, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(gloo, "SECONDS", 5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def policy() -> Policy:
    model, tokenizer = tiny_policy()
    return Policy(model=model.eval(), tokenizer=tokenizer, device=torch.device("cpu"), version="run:0")


def engine(sync: Any, *servers: Stub) -> Any:
    made = load_plugin("rollout", "vllm", url=[server.url for server in servers], sync=sync, max_new_tokens=4)
    for plugin in (made, made.sync):
        plugin.setup(context())
    return made


def move(own: Policy, version: str) -> None:
    own.version = version
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def send(made: Any, own: Policy) -> None:
    made.load(Weights(policy=own, named=lambda: iter(own.model.state_dict().items())))


def same(server: Stub, own: Policy) -> bool:
    theirs = server.model.state_dict()
    return all(torch.equal(theirs[name], x) for name, x in own.model.state_dict().items())


@pytest.mark.proves("sync.folder", how="identity", tolerance="0")
@pytest.mark.proves("sync.gloo", how="identity", tolerance="0")
@pytest.mark.parametrize("sync", TRANSPORTS)
def test_every_server_has_the_policys_weights_to_the_bit_after_each_load(tmp_path, sync):
    own = policy()
    with Stub(tmp_path / "model") as one, Stub(tmp_path / "model") as two:
        made = engine(sync, one, two)
        for step in range(3):
            move(own, f"run:{step}")
            send(made, own)
            assert same(one, own)
            assert same(two, own)
            assert one.version == two.version == f"run:{step}"
        calls = [body["method"] for body in one.sent("/collective_rpc")]
        made.sync.close()
    assert calls.count("hf_rlhf_connect") == (1 if sync == "gloo" else 0), "one connection for all loads"


@pytest.mark.parametrize("sync", TRANSPORTS)
def test_a_server_that_was_started_again_gets_the_same_weights_again(tmp_path, sync):
    own = policy()
    with Stub(tmp_path / "model") as server:
        made = engine(sync, server)
        move(own, "run:1")
        send(made, own)
        server.restart()
        with torch.no_grad():
            out = made(own, [Prompt(ids=[40, 41], prompt="x")], 2)
        assert same(server, own)
        assert out.versions == ["run:1"] * 2
        server.restart()
        move(own, "run:2")
        send(made, own)
        assert same(server, own)


def test_another_process_may_take_over_the_connection(tmp_path):
    own, other = policy(), policy()
    with Stub(tmp_path / "model") as server:
        first, second = engine("gloo", server), engine("gloo", server)
        for made, weights in ((first, own), (second, other), (first, own)):
            move(weights, weights.version + "1")
            send(made, weights)
            assert same(server, weights)


def test_a_connection_that_is_lost_in_the_middle_of_an_update_is_made_again(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        made = engine("gloo", server)
        send(made, own)
        lost = []

        def trouble(route: str, body: Any, number: int) -> Any:
            if route == "/collective_rpc" and body["method"] == "hf_rlhf_receive" and not lost:
                lost.append(number)
                server.group = server.connection = None  # closed without a word
                return {"results": [{"error": "RuntimeError: connection closed by peer"}]}
            return None

        server.trouble = trouble
        move(own, "run:1")
        send(made, own)
        assert lost
        assert same(server, own)


def test_what_a_worker_cannot_load_ends_with_its_reason(tmp_path):
    own = policy()
    with Stub(tmp_path / "model") as server:
        made = engine("gloo", server)
        made.sync.collect(Weights(policy=own, named=lambda: iter({"other.weight": torch.zeros(2)}.items())))
        with pytest.raises(_http.HttpError, match=r"cannot load the weights: unknown: \['other.weight'\]"):
            asyncio.run(made.sync.send(_Held(made._servers[0])))


class _Held:
    """A server that generates nothing while weights are sent."""

    def __init__(self, server: Any) -> None:
        self.url, self.server = server.url, server

    async def call(self, *words: Any, **options: Any) -> Any:
        await self.server.post("/pause?mode=wait")
        return await self.server.call(*words, **options)


def test_a_tied_head_goes_once_and_half_precision_stays_half():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=12, tie_word_embeddings=True, **sizes)).bfloat16()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    found = dict(_transfer.checkpoint_tensors(tied, tied.state_dict()))
    assert "model.embed_tokens.weight" in found
    assert "lm_head.weight" not in found
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    assert set(found) == set(tied.state_dict()) - {"lm_head.weight"}


@pytest.mark.parametrize("name", ["nccl", "ipc"])
def test_transports_between_gpus_are_refused_on_a_cpu_with_what_to_set(name):
    with pytest.raises(ValueError, match=rf"sync={name} .* the policy is on cpu. Set rollout.sync.use=folder"):
        load_plugin("sync", name).setup(context())


@pytest.mark.parametrize("name", ["gloo", "nccl", "ipc"])
def test_an_adapter_goes_by_the_folder_alone(tmp_path, name):
    adapted = copy.deepcopy(policy().model)
    adapted.peft_config = {}
    with Stub(tmp_path / "model", lora_rank=8) as server:
        made = load_plugin("rollout", "vllm", url=server.url, sync=name)
        adapted.peft_config = {"default": type("Config", (), {"r": 4})()}
        with pytest.raises(
            ValueError, match=f"an adapter, which rollout.sync={name} does not send: set rollout.sync.use=folder"
        ):
            made.setup(context(policy=adapted))


@pytest.mark.parametrize("name", ["folder", "gloo", "nccl", "ipc"])
def test_the_servers_command_chooses_the_backend(name):
    from hf_rlhf.axes import ModelSettings

    made = load_plugin("rollout", "vllm", sync=name)
    ((variables, words),) = made.serve_commands(ModelSettings(path="some/model"), "float32", 10)
    chosen = [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "--weight-transfer-config"]
    assert chosen == ([] if name == "folder" else [{"backend": name}])
    assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in variables) is (name == "ipc")


def test_the_modules_for_vllms_environment_import_torch_and_vllm_alone():
    folder = ROOT / "plugins" / "rollout" / "_vllm_worker"
    for path in folder.glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
        assert imported <= {"torch", "vllm", *sys.stdlib_module_names}, path
    assert {path.name for path in folder.glob("*.py")} == {
        "__init__.py",
        "hf_rlhf_vllm_worker.py",
        "hf_rlhf_vllm_gloo.py",
    }
