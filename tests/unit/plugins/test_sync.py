"""Transports of weights to servers that speak as vLLM's worker extension does: what arrives, and what is lost on the way."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import copy
import json
import pickle
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rlhf import load_plugin
from hf_rlhf.axes import Weights
from hf_rlhf.batch import Prompt
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.testing import conformance, tiny_policy
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


@pytest.mark.proves("sync.folder", how="end to end", tolerance="exact")
@pytest.mark.proves("sync.gloo", how="end to end", tolerance="exact")
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
def test_transports_between_gpus_conform_before_they_are_set_up(name):
    for fact in conformance(load_plugin("sync", name)):
        fact()


@pytest.mark.parametrize("name", ["nccl", "ipc"])
def test_transports_between_gpus_are_refused_on_a_cpu_with_what_to_set(name):
    with pytest.raises(ValueError, match=rf"sync={name} .* the policy is on cpu. Set rollout.sync.use=folder"):
        load_plugin("sync", name).setup(context())


class Workers:
    """A server of one worker, whose calls are noted."""

    url = "http://127.0.0.1:8000"

    def __init__(self, workers: int = 1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.workers = workers

    async def call(self, method: str, *arguments: Any, repeat: bool = True) -> list[dict[str, Any]]:
        self.calls.append((method, *arguments))
        connected = [call[1] for call in self.calls if call[0] == "hf_rlhf_connect"]
        return [{"connection": connected[-1] if connected else None, "workers": self.workers}] * self.workers


def sent_from_a_gpu(name: str, monkeypatch: Any, own: Policy, workers: int = 1) -> tuple[Workers, list[Any]]:
    """The calls to a server, and those of NCCL, of two loads; the policy's memory stands for that of a GPU."""
    said: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Gpu", (), {"uuid": "GPU-1"}))
    monkeypatch.setattr(torch.cuda.nccl, "unique_id", lambda: bytes(range(128)))
    monkeypatch.setattr(torch.cuda.nccl, "init_rank", lambda *words: said.append(("init", *words)) or "group")
    monkeypatch.setattr(torch.cuda.nccl, "all_reduce", lambda x, comms: said.append(("sum", x[0].shape, comms)))
    monkeypatch.setattr(torch.cuda.nccl, "broadcast", lambda x, comms: said.append(("send", x[0].clone(), comms)))
    monkeypatch.setattr("torch.multiprocessing.reductions.reduce_tensor", lambda x: ("rebuild", (x.data_ptr(),)))
    made, server = load_plugin("sync", name), Workers(workers)
    made._device = torch.device("cpu")
    for _ in range(2):
        made.collect(Weights(policy=own, named=lambda: iter(own.model.state_dict().items())))
        asyncio.run(made.send(server))
    return server, said


@pytest.mark.proves("sync.nccl", how="invariance", tolerance="exact")
def test_nccl_connects_once_and_broadcasts_every_tensor_in_the_order_that_it_announced(monkeypatch):
    own = policy()
    server, said = sent_from_a_gpu("nccl", monkeypatch, own, workers=2)
    methods = [call[0] for call in server.calls]
    assert methods == ["hf_rlhf_describe", "hf_rlhf_connect", "hf_rlhf_receive", "hf_rlhf_describe", "hf_rlhf_receive"]
    info = server.calls[1][2]
    assert (info["rank_offset"], info["world_size"]) == (1, 3)
    assert base64.b64decode(info["nccl_unique_id_b64"]) == bytes(range(128))
    assert said[:2] == [("init", 3, bytes(range(128)), 0), ("sum", (1,), ["group"])]
    update, state = server.calls[2][2], own.model.state_dict()
    tensors = [call[1] for call in said if call[0] == "send"]
    assert len(tensors) == 2 * len(update["names"]) == 2 * len(state)
    for name, dtype, shape, x in zip(update["names"], update["dtype_names"], update["shapes"], tensors, strict=False):
        assert torch.equal(x, state[name])
        assert (dtype, shape) == ("float32", list(state[name].shape))


@pytest.mark.proves("sync.ipc", how="invariance", tolerance="exact")
def test_ipc_hands_over_the_policys_own_memory(monkeypatch):
    own = policy()
    server, said = sent_from_a_gpu("ipc", monkeypatch, own)
    update, state = server.calls[2][2], own.model.state_dict()
    handles = pickle.loads(base64.b64decode(update["ipc_handles_pickled"]))
    assert handles == [{"GPU-1": (state[name].data_ptr(),)} for name in update["names"]]
    assert said == []
    with pytest.raises(ValueError, match="a server of one worker on the training's GPU, got 2"):
        sent_from_a_gpu("ipc", monkeypatch, own, workers=2)


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
