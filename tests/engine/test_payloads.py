"""What `nccl` and `ipc` send, read by vLLM's own classes: their calls need a GPU, their payloads do not."""

from __future__ import annotations

import asyncio
import json
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.cuda import nccl
from torch.multiprocessing import reductions

from hf_rlhf import load_plugin
from hf_rlhf.axes import Weights
from hf_rlhf.testing import tiny_policy
from tests.helpers.vllm_servers import python_of_vllm

pytestmark = pytest.mark.engine

READ = """
import json, os, sys
from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
backend, info, update = json.load(sys.stdin)
engine = {"nccl": nccl_engine.NCCLWeightTransferEngine, "ipc": ipc_engine.IPCWeightTransferEngine}[backend]
init = engine.parse_init_info(engine, info)
read = engine.parse_update_info(engine, update)
handles = getattr(read, "ipc_handles", None)
print(json.dumps([init.packed, getattr(init, "world_size", 2), read.names, read.dtype_names, read.shapes, handles]))
"""


class Server:
    """Keeps what the workers of a server would get."""

    url = "http://127.0.0.1:8000"

    def __init__(self, workers: int):
        self.workers = workers
        self.calls: dict[str, tuple[Any, ...]] = {}

    async def call(self, method: str, *arguments: Any, repeat: bool = True) -> Any:
        self.calls[method] = arguments
        return [{"connection": None, "workers": self.workers}] * self.workers


@pytest.mark.parametrize(("backend", "workers"), [("nccl", 3), ("ipc", 1)])
def test_vllm_reads_what_connects_and_what_updates(backend, workers, monkeypatch):
    sync, server = load_plugin("sync", backend), Server(workers)
    sync._device = torch.device("cpu")
    joined: list[int] = []
    monkeypatch.setattr(nccl, "unique_id", lambda: bytes(range(128)))
    monkeypatch.setattr(type(sync), "_join", lambda self, unique, world: joined.append(world), raising=False)
    monkeypatch.setattr(type(sync), "_broadcast", lambda self, group, tensors: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(reductions, "reduce_tensor", lambda x: (None, (tuple(x.shape), x.data_ptr())))
    model, _ = tiny_policy()
    policy: Any = SimpleNamespace(model=model)
    sync.collect(Weights(policy=policy, named=lambda: iter(model.state_dict().items())))
    asyncio.run(sync.send(server))

    _, info = server.calls["hf_rlhf_connect"]
    _, update = server.calls["hf_rlhf_receive"]
    flags, _ = sync.serve_flags()
    read = subprocess.run(
        [python_of_vllm(), "-c", READ],
        input=json.dumps([backend, info, update]),
        env={"PATH": "/usr/bin:/bin", **flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert read.returncode == 0, read.stderr[-2000:]
    packed, world, names, dtypes, shapes, handles = json.loads(read.stdout.splitlines()[-1])
    tensors = dict(model.named_parameters())
    assert not packed
    assert (world, joined) == ((workers + 1, [workers + 1]) if backend == "nccl" else (2, []))
    assert set(names) == set(tensors)
    assert [torch.Size(shape) for shape in shapes] == [tensors[name].shape for name in names]
    assert set(dtypes) == {"float32"}
    if backend == "ipc":
        assert [each["GPU-1"][1] for each in handles] == [tensors[name].data_ptr() for name in names]
