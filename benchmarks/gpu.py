"""Cycles and parts on one GPU, ten minutes: own decode loop, update by phase, FlexAttention, head, memory, vLLM, TRL.

`python -m benchmarks.gpu [--tiny] [--only NAME ...] [--cycles 2] [--json PATH] [--page]`

The model has the shape of Qwen3-0.6B and random weights in float32, and computes in bfloat16. Every case is a process of its
own, whose first cycle is dropped; seconds are wall time with the GPU waited for, peaks are the allocator's. Cases that need
what a machine lacks are left out with the reason: vLLM runs with the Python that VLLM_PYTHON names, TRL's vLLM where this
environment has one, NCCL with a second GPU. `--tiny` runs a small model for a few tokens, on a CPU too, and shows nothing but
that the code runs. The result goes to benchmarks/results/gpu.json and, as a page, to gpu.md; `--page` writes the page alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks import gpu_page, systems
from benchmarks.engine import Forced
from benchmarks.micro_parts import apart, in_turn
from benchmarks.peak import peak
from benchmarks.record import RESULTS, head, write
from benchmarks.trl import QUIET
from benchmarks.work import Line, dataset, make_model, prompt_ids, script

FULL = Line(
    name="gpu",
    title="Qwen3-0.6B's shape",
    vocabulary=151_936,
    hidden=1024,
    layers=28,
    intermediate=3072,
    heads=16,
    kv_heads=8,
    head_dim=128,
    prompts=64,
    longest=256,
    shortest_prompt=64,
    longest_prompt=128,
)
SMALL: dict[str, Any] = {"vocabulary": 512, "hidden": 64, "layers": 2, "intermediate": 96, "heads": 4, "kv_heads": 2}
TINY = replace(FULL, **SMALL, head_dim=32, prompts=2, longest=12, shortest_prompt=4, longest_prompt=8)
TOKENS = 8192
"""Most tokens of a micro-batch of ours."""
THEIR_ROWS = 32
"""Rows of a micro-batch of TRL's: 12,288 tokens with the longest prompts and completions."""
MODULE = "benchmarks.gpu"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A measurement in a process of its own; `lengths` as those of a `Line`."""

    title: str
    run: Callable[[Case, Line, int, str], dict[str, Any]]
    lengths: str = "lognormal"
    settings: dict[str, Any] = field(default_factory=dict)
    gpus: int = 0
    vllm: str = ""
    """The vLLM that it needs: `server`, of VLLM_PYTHON, or `here`, in this environment."""

    def lacks(self) -> str | None:
        """Return what this machine has not; None if the case can run."""
        if torch.cuda.device_count() < self.gpus:
            return f"needs {self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        if self.vllm == "server" and not os.environ.get("VLLM_PYTHON"):
            return "VLLM_PYTHON names no environment with vLLM"
        if self.vllm == "here" and importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed beside TRL"
        return None


def device() -> str:
    """Return the device of everything here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def clock() -> float:
    """Return the wall time once the device has nothing left to do."""
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training() -> dict[str, Any]:
    """TrainingArguments of ours and TRL's."""
    return {"use_cpu": device() == "cpu", "bf16": True}


def measured(trainer: Any, watch: systems.Stopwatch, lengths: list[list[int]]) -> dict[str, Any]:
    """Train; return the median cycle but the first, tokens per second and the peak."""
    with peak(device()) as held:
        trainer.train()
    cycles = watch.cycles[1:]
    made = [sum(rows) for rows in lengths[1:]]
    names = {name for cycle in cycles for name in cycle.phases}
    return {
        "seconds": median(cycle.seconds for cycle in cycles),
        "range": [min(cycle.seconds for cycle in cycles), max(cycle.seconds for cycle in cycles)],
        "phases": {name: median(cycle.phases.get(name, 0.0) for cycle in cycles) for name in sorted(names)},
        "tokens_per_second": sum(made) / sum(cycle.seconds for cycle in cycles),
        "peak_gib": held.peak / 2**30,
    }


# Cycles


def ours(case: Case, line: Line, cycles: int, folder: str) -> dict[str, Any]:
    """Cycles of `RLHFTrainer`, and its forecast of the memory of each phase."""
    from hf_rlhf.contract.model_settings import Model
    from hf_rlhf.runtime.peak_memory import MIB
    from hf_rlhf.training.memory.estimate import estimate

    watch, lengths = systems.Stopwatch(1, clock), []
    update = {"max_tokens_per_micro_batch": TOKENS, "attention": case.settings.get("attention", "auto")}
    parts: dict[str, Any] = {"update": update}
    engine: Any = Forced.of(line)
    if case.vllm:
        sizes = {"prompts": line.prompts, "num_generations": line.group, "max_new_tokens": line.longest}
        engine = {"use": "vllm", **server(line, **case.settings), **sizes}
    trainer = systems.our_trainer(
        line, folder, dataset(line, cycles), engine, watch, parts, max_steps=cycles, **training()
    )
    rollout = trainer.collector.roll_out

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = rollout(*args, **kwargs)
        lengths.append([len(ids) for ids in found[0].ids])
        return found

    trainer.collector.roll_out = counted
    systems.watch_ours(trainer, watch)
    model = make_model(line)
    own = {"model": model, "peft_config": None, "prompt_tokens": line.longest_prompt}
    forecast = {k: sum(x.values()) for k, x in estimate(Model(), trainer.algorithm, trainer.args, **own).phases.items()}
    del model, own
    try:
        found = measured(trainer, watch, lengths)
    finally:
        trainer.close()
    held: dict[str, float] = {}
    for entry in trainer.state.log_history:
        for phase in forecast:
            held[phase] = max(held.get(phase, 0.0), entry.get(f"memory/{phase}/peak", 0.0))
    gib = {phase: [forecast[phase] * MIB / 2**30, held[phase] * MIB / 2**30] for phase in forecast}
    return {**found, "attention": trainer.collector.forwards.batching.attention, "memory": gib}


def theirs(case: Case, line: Line, cycles: int, folder: str) -> dict[str, Any]:
    """Cycles of TRL's trainer."""
    watch, lengths = systems.Stopwatch(1, clock), []
    own = {**training(), **case.settings, "max_steps": cycles}
    trainer = systems.their_trainer(line, folder, dataset(line, cycles), watch, min(THEIR_ROWS, line.rows), **own)
    if not case.vllm:
        systems.force(trainer.model, line)
    systems.watch_trl(trainer, watch, lengths)
    return measured(trainer, watch, lengths)


# Parts


def layouts(case: Case, line: Line, cycles: int, folder: str) -> dict[str, Any]:
    """Forward and backward of the log-probs of one micro-batch: seconds, of the first call too, peak, distance to padded rows."""
    from hf_rlhf.modeling.policy import ActorCritic
    from hf_rlhf.modeling.token_batch import TokenBatch

    few = replace(line, prompts=max(1, line.prompts // 8))
    actor = ActorCritic(make_model(line).to(device()), None, 1.0)
    prompts = [ids for ids in prompt_ids(few, 0) for _ in range(few.group)]
    completions = script(few, 0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(ids)) for ids in completions], batch_first=True)

    def run(attention: Any) -> Callable[[], list[torch.Tensor]]:
        batch = TokenBatch(prompts, completions, mask.to(device()), 0, attention)

        def once() -> list[torch.Tensor]:
            actor.zero_grad()
            with torch.autocast(device(), torch.bfloat16):
                logps = actor(batch)["logps"]
            logps.sum().backward()
            return [logps.detach().float(), *(p.grad for p in actor.parameters() if p.grad is not None)]

        return once

    variants = {name: run(name) for name in ("padded", "packed", *(["flex"] if device() == "cuda" else []))}
    rows, due = {}, None
    for name, once in variants.items():
        began = clock()
        with peak(device()) as held:
            found = [x.clone() for x in once()]
        due = due or found
        rows[name] = {"first": clock() - began, "peak_gib": held.above / 2**30, "apart": apart(found, due)}
    for name, seconds in in_turn(variants, cycles, clock).items():
        rows[name]["seconds"] = seconds
    return {"rows": rows, "tokens": sum(map(len, completions))}


def tiles(case: Case, line: Line, cycles: int, folder: str) -> dict[str, Any]:
    """Forward and backward of the head in tiles of several sizes, and with all logits at once."""
    from hf_rlhf.modeling import lm_head

    count = 4 * line.longest
    linear = torch.nn.Linear(line.hidden, line.vocabulary, bias=False).to(device())
    states = torch.randn(count, line.hidden, device=device()).requires_grad_()
    targets = torch.randint(line.vocabulary, (count,), device=device())

    def run(tokens: int) -> Callable[[], None]:
        def once() -> None:
            states.grad = linear.weight.grad = None
            tiled = mock.patch.object(lm_head, "tokens_at_a_time", return_value=tokens)
            with tiled, torch.autocast(device(), torch.bfloat16):
                wanted = lm_head.TokenStatistics(entropy=True)
                lm_head.score(lm_head.Head(linear), states, targets, 1.0, wanted)["logps"].sum().backward()

        return once

    sizes = sorted({count // 8, count // 4, count // 2, count})
    variants = {str(tokens): run(tokens) for tokens in sizes}
    rows = {}
    for name, once in variants.items():
        with peak(device()) as held:
            once()
        rows[name] = {"peak_gib": held.above / 2**30}
    for name, seconds in in_turn(variants, cycles, clock).items():
        rows[name]["seconds"] = seconds
    return {"rows": rows, "tokens": count}


def loop(case: Case, line: Line, cycles: int, folder: str) -> dict[str, Any]:
    """Measure sampling alone, every completion of full length: the own loop and transformers' `generate`."""
    from hf_rlhf.batch import Prompt
    from hf_rlhf.modeling.policy import Policy

    model, tokenizer = make_model(line).to(device()).eval(), systems.make_tokenizer(line.vocabulary)
    engine, prompts = Forced.of(line), prompt_ids(line, 0)
    policy = Policy(model=model, tokenizer=tokenizer, device=torch.device(device()), wants_logps=True)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts for _ in range(line.group)])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts for _ in range(line.group)])
    inputs = {"input_ids": padded.to(device()), "attention_mask": mask.to(device())}
    limits = {"max_new_tokens": line.longest, "min_new_tokens": line.longest, "pad_token_id": 0}

    def own() -> None:
        engine(policy, [Prompt(ids=ids, prompt="") for ids in prompts], line.group)

    def generate() -> None:
        model.generate(**inputs, **limits, do_sample=True)

    with torch.no_grad(), torch.autocast(device(), torch.bfloat16):
        variants = {"the own loop": own, "`generate`": generate}
        for once in variants.values():
            once()
        seconds = in_turn(variants, cycles, clock)
    return {"seconds": seconds, "tokens": line.rows * line.longest}


def server(line: Line, sync: str, devices: list[int] | None = None) -> dict[str, Any]:
    """Return settings of the engine `vllm`, whose server the run starts; it shares the GPU if it gets none of its own."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port = asked.getsockname()[1]
    args = ["--max-model-len", str(line.longest_prompt + line.longest)]
    args += ["--enforce-eager"] if device() == "cpu" else ["--gpu-memory-utilization", "0.9" if devices else "0.3"]
    serve = {"python": os.environ["VLLM_PYTHON"], "devices": devices, "args": args}
    return {"url": f"http://127.0.0.1:{port}", "serve": serve, "sync": sync}


CASES: dict[str, Case] = {
    "loop": Case(title="the own loop next to `generate`", run=loop, lengths="full"),
    "layouts": Case(title="layouts of rows", run=layouts),
    "head": Case(title="the head in tiles", run=tiles),
    "flex": Case(title="ours, FlexAttention", run=ours, settings={"attention": "flex"}, gpus=1),
    "packed": Case(title="ours, packed", run=ours, settings={"attention": "packed"}),
    "padded": Case(title="ours, padded", run=ours, settings={"attention": "padded"}),
    "trl": Case(title="TRL", run=theirs),
    "full": Case(title="ours, own loop", run=ours, lengths="full"),
    "vllm-folder": Case(
        title="ours, vLLM, weights by a folder", run=ours, lengths="full", settings={"sync": "folder"}, vllm="server"
    ),
    "vllm-ipc": Case(
        title="ours, vLLM on the same GPU, weights by CUDA IPC",
        run=ours,
        lengths="full",
        settings={"sync": "ipc"},
        gpus=1,
        vllm="server",
    ),
    "vllm-nccl": Case(
        title="ours, vLLM on a second GPU, weights by NCCL",
        run=ours,
        lengths="full",
        settings={"sync": "nccl", "devices": [1]},
        gpus=2,
        vllm="server",
    ),
    "trl-vllm": Case(
        title="TRL, vLLM on the same GPU",
        run=theirs,
        lengths="full",
        settings={"use_vllm": True, "vllm_mode": "colocate"},
        gpus=1,
        vllm="here",
    ),
}


# The command


def one(name: str, tiny: bool, cycles: int) -> dict[str, Any]:
    """Run a case in this process. The first cycle is beyond `cycles`, to be dropped."""
    case, line = CASES[name], replace(TINY if tiny else FULL, lengths=CASES[name].lengths)
    more = 1 if case.run in (ours, theirs) else 0
    with tempfile.TemporaryDirectory() as folder:
        return case.run(case, line, cycles + more, folder)


def in_own_process(name: str, tiny: bool, cycles: int) -> dict[str, Any]:
    """Run a case in a fresh process; a reason in place of figures where it cannot, or did not."""
    if (lacking := CASES[name].lacks()) is not None:
        return {"not_run": lacking}
    command = [sys.executable, "-W", "ignore", "-m", MODULE, "--one", name, "--cycles", str(cycles)]
    done = subprocess.run(
        command + (["--tiny"] if tiny else []), capture_output=True, text=True, env={**os.environ, **QUIET}
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raised = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return {"failed": (raised or [f"exit code {done.returncode}"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the cases and write the page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model and few tokens, on a CPU too")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help="write the page again, from the figures that are there")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.tiny, options.cycles)))
        return
    path = options.json or RESULTS / ("gpu_tiny.json" if options.tiny else "gpu.json")
    if not options.page:
        if device() == "cpu" and not options.tiny:
            raise SystemExit("torch sees no GPU: run it where it sees one, or with --tiny")
        name = torch.cuda.get_device_name() if device() == "cuda" else "a CPU"
        command = f"python -m {MODULE}" + (" --tiny" if options.tiny else "")
        found: dict[str, Any] = {**head(command), "device": name, "tiny": options.tiny, "cases": {}}
        for name in options.only:
            found["cases"][name] = in_own_process(name, options.tiny, options.cycles)
            print(name, json.dumps(found["cases"][name]), flush=True)
            write(path, found)
    found = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    path.with_suffix(".md").write_text(gpu_page.page(found, {name: case.title for name, case in CASES.items()}))
    if any("failed" in case for case in found["cases"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
