"""Rows 1 to 26: what a reward or another plugin does wrong, and rollouts without anything to learn."""

from __future__ import annotations

import math

from benchmarks.faults.world import RECIPE, World, expect, fault

RAISES = """
from pathlib import Path

def score(completions):
    calls = Path("calls")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    if len(calls.read_text()) == 2:
        {trouble}
    return [len(set(text)) / 8 for text in completions]
"""
"""A reward whose second call has trouble."""
WRONG = """
import numpy, torch

def score(completions):
    scores = [len(set(text)) / 8 for text in completions]
    return {answer}
"""
"""A reward that gives something else than a list of numbers."""


def survived(world: World, count: str, trouble: str, **settings: object) -> str:
    """Train with a reward whose second call fails. Returns the line that tells of it."""
    world.reward(RAISES.format(trouble=trouble), failure_budget=0.5, **settings)
    run = world.train().well()
    expect(len(world.entries()) == 6, f"{len(world.entries())} of 6 steps")
    expect(world.logged(count)[1] > 0, f"{count} does not count it: {world.logged(count)}")
    expect(math.isfinite(sum(world.logged("loss"))), f"losses {world.logged('loss')}")
    return run.line("score")


@fault(1, "reward raises", "leave its rows without a score and name it", trl="the run dies")
def _(world: World) -> str:
    line = survived(world, "health/reward_error", "raise ValueError('a bug')")
    world.reward(RAISES.format(trouble="raise ValueError('a bug')"), on_error="raise")
    world.train().stopped().line("a bug")
    return line


@fault(2, "reward hangs", "end the call at its time limit", trl="hangs")
def _(world: World) -> str:
    inline = survived(world, "health/reward_timeout", "import time; time.sleep(3600)", timeout=2)
    survived(world, "health/reward_timeout", "import time; time.sleep(3600)", timeout=2, workers="processes")
    return inline


@fault(3, "async reward hangs", "end the call at its time limit", trl="hangs")
def _(world: World) -> str:
    code = RAISES.replace("def score", "import asyncio\nasync def score")
    world.reward(code.format(trouble="await asyncio.sleep(3600)"), failure_budget=0.5, timeout=2)
    run = world.train().well()
    expect(world.logged("health/reward_timeout")[1] > 0, "not counted")
    return run.line("score")


@fault(4, "NaN from a reward", "leave the row without a score and say so", trl="counts as None, without a word")
def _(world: World) -> str:
    world.reward(RAISES.format(trouble="return [float('nan')] + [len(set(text)) / 8 for text in completions[1:]]"))
    run = world.train().well()
    expect(world.logged("health/reward_missing")[1] > 0, "not counted")
    return run.line("NaN")


@fault(5, "None from a reward", "leave the row out of its baseline; all None: no update", trl="left out")
def _(world: World) -> str:
    world.reward(RAISES.format(trouble="return [None] + [len(set(text)) / 8 for text in completions[1:]]"))
    world.train().well()
    missing = world.logged("health/reward_missing")
    expect(missing[1] > 0, "not counted")
    world.reward("def score(completions):\n    return [None] * len(completions)")
    return world.train().stopped().line("no completion was scored")


@fault(
    6,
    "inf and 1e38 from a reward",
    "reject what is not finite, and stay finite",
    trl="the group's advantages become 0 and inf is logged",
)
def _(world: World) -> str:
    world.reward(RAISES.format(trouble="return [float('inf')] + [1e38] + [0.5] * (len(completions) - 2)"))
    run = world.train()
    expect(all(map(math.isfinite, world.logged("loss"))), f"losses {world.logged('loss')}")
    expect(all(map(math.isfinite, world.logged("reward/total/mean"))), "the logged reward is not finite")
    return run.line("inf")


def refusals(world: World, answers: list[str]) -> str:
    """Train with rewards that answer so, each of which must stop the run by name. Returns the last message."""
    line = ""
    for answer in answers:
        world.reward(WRONG.format(answer=answer))
        run = world.train()
        line = run.stopped().line("error:", "score")
    return line


@fault(7, "too few scores", "stop with the name of the reward", trl="an error that names it")
def _(world: World) -> str:
    return refusals(world, ["scores[1:]", "scores + scores"])


@fault(
    8, "scalar, None, mapping or text for scores", "stop with the name of the reward", trl="a TypeError without a name"
)
def _(world: World) -> str:
    return refusals(world, ["0.5", "None", "dict(enumerate(scores))", "'0.5'", "['0.5'] * len(scores)"])


@fault(9, "array, tensor or bool for scores", "accept one dimension, refuse two", trl="all are accepted")
def _(world: World) -> str:
    for answer in ("numpy.array(scores)", "torch.tensor(scores)", "[bool(score > 0.5) for score in scores]"):
        world.reward(WRONG.format(answer=answer))
        world.train("--save_strategy", "no").well()
    return refusals(world, ["numpy.array(scores)[:, None]", "torch.tensor(scores)[:, None]"])


@fault(
    10,
    "sys.exit(0) in a reward",
    "leave the rows without a score; never exit 0",
    trl="exits with 0 in the middle of a run",
)
def _(world: World) -> str:
    line = survived(world, "health/reward_error", "raise SystemExit(0)")
    world.reward("import sys\ndef score(completions):\n    sys.exit(0)")
    world.train().stopped()
    return line


@fault(11, "reward kills its process", "replace the worker", trl="the run dies")
def _(world: World) -> str:
    return survived(world, "health/reward_error", "import os; os._exit(139)", workers="processes")


@fault(12, "reward takes all memory", "bound the worker", trl="the run dies")
def _(world: World) -> str:
    settings = {"workers": "processes", "memory_mib": 2000}
    return survived(world, "health/reward_error", "hog = bytearray(20 * 2**30)", **settings)


def scripted(world: World, texts: list[str], **parts: object) -> None:
    """Let the policy sample these texts."""
    completions = (texts * 4)[:4]
    world.rows([{"prompt": f"{i}+{i}=", "answer": "4", "completions": completions} for i in range(8)])
    world.recipe(rollout={"use": "scripted", "prompts": 2, "num_generations": 4}, **parts)


def hostile_math(world: World, answer: str) -> str:
    """Score an answer that takes for ever, in the main thread and in others."""
    reward = {"use": "math_answer", "timeout": 5}
    scripted(world, [rf"\boxed{{{answer}}}", r"\boxed{4}", r"\boxed{5}", r"\boxed{4}"], rewards=[reward])
    run = world.train("training.max_steps=2").well()
    expect(all(score == 0.5 or score > 0.6 for score in world.logged("reward/math_answer/mean")), "other scores")
    return f"{run.seconds:.0f} s for two steps, right answers still score 1"


@fault(13, "an answer that is a huge power", "end it in a process of its own", trl="the main thread hangs")
def _(world: World) -> str:
    return hostile_math(world, "9^{9^{9^{9}}}+1")


@fault(
    14,
    "an answer that is a huge factorial",
    "end it in a process of its own",
    trl="5 s in the main thread; hangs in others",
)
def _(world: World) -> str:
    return hostile_math(world, "(10^9)!")


@fault(15, "time limit outside the main thread", "hold as in the main thread", trl="no time limits")
def _(world: World) -> str:
    trouble = "import time; time.sleep(3600)"
    return survived(world, "health/reward_timeout", trouble, timeout=2, workers="threads")


@fault(17, "reward changes its arguments", "train as without", trl="unchanged")
def _(world: World) -> str:
    code = "def score(completions, answer, **columns):\n    scores = [len(set(t)) / 8 for t in completions]\n"
    code += "    completions.clear(); answer.clear(); columns.clear()\n    return scores"
    world.same_as_quiet(code)
    return "the weights of a quiet run"


@fault(18, "reward draws random numbers", "train as without", trl="other completions")
def _(world: World) -> str:
    drawing = "import random, numpy, torch\nrandom.random(); numpy.random.rand(100); torch.rand(100)"
    world.same_as_quiet(PLAIN_WITH.format(trouble=drawing.replace("\n", "; ")))
    return "the weights of a quiet run"


PLAIN_WITH = """
def score(completions):
    {trouble}
    return [len(set(text)) / 8 for text in completions]
"""


@fault(19, "reward seeds the generators", "train as without", trl="completions repeat")
def _(world: World) -> str:
    seeding = "import random, numpy, torch; random.seed(0); numpy.random.seed(0); torch.manual_seed(0)"
    world.same_as_quiet(PLAIN_WITH.format(trouble=seeding))
    return "the weights of a quiet run"


@fault(
    20, "reward disables gradients, changes the dtype", "train as without", trl="the backward fails, or other weights"
)
def _(world: World) -> str:
    globals_ = "import torch; torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64)"
    world.same_as_quiet(PLAIN_WITH.format(trouble=globals_))
    return "the weights of a quiet run"


@fault(21, "two rewards of one name", "refuse them, or tell them apart", trl="one metric of both")
def _(world: World) -> str:
    world.recipe(rewards=[{"use": "function", "function": "reward.py:score"}] * 2)
    return world.train().refused().line("called 'score'")


METRIC = '''
from dataclasses import dataclass
from hf_rlhf import Metric, hookimpl
from hf_rlhf_plugins.policy_loss.ppo_clip import PPOClip

@dataclass(kw_only=True)
class Loud(PPOClip):
    """ppo_clip with a metric of the core's name."""
    name = "loud"
    metrics = (*PPOClip.metrics, Metric("{name}", "1", "a number"))

    def __call__(self, *args, **kwargs):
        loss, metrics = super().__call__(*args, **kwargs)
        return loss, {{**metrics, "{name}": loss.detach() * 0 + 5}}

@hookimpl
def policy_loss():
    return [Loud]
'''


@fault(
    22, "plugin overwrites a metric of the core", "keep it apart, or refuse it", trl="the logged reward is the plugin's"
)
def _(world: World) -> str:
    world.train(out="quiet").well()
    lines = []
    for name in ("reward/total/mean", "loss", "ratio"):
        world.recipe(policy_loss="loud")
        world.write("loud.py", METRIC.format(name=name))
        run = world.train("-p", "loud.py")
        if run.code == 0:
            for metric in ("reward/total/mean", "loss", "policy/ratio"):
                expect(world.logged(metric) == world.logged(metric, "quiet"), f"{metric} is the plugin's")
            lines.append(f"{name}: kept apart")
        else:
            lines.append(run.line("error:", name))
    return lines[-1]


@fault(23, "text that no log can hold", "write what can be written, go on", trl="the run dies")
def _(world: World) -> str:
    trouble = r"raise ValueError('\ud800 \x1b[2J \x00 forged')"
    line = survived(world, "health/reward_error", trouble)
    expect("\x1b" not in line and "\x00" not in line, "control characters reach the terminal")
    tables = list((world.folder / "out" / "completions").iterdir())
    expect(tables, "no completions were written")
    return line


@fault(24, "all rewards are equal", "change nothing, count it", trl="no drift")
def _(world: World) -> str:
    world.reward("def score(completions):\n    return [1.0] * len(completions)")
    world.train().well()
    expect(world.weights() == world.weights("model"), "the weights moved")
    expect(set(world.logged("reward/zero_std_frac")) == {1.0}, "not counted")
    return "weights unchanged, reward/zero_std_frac is 1"


@fault(25, "empty completion", "have a finite loss", trl="finite")
def _(world: World) -> str:
    scripted(world, ["", "4", "", "5"])
    world.train().well()
    losses = world.logged("loss")
    expect(len(losses) == 6 and all(map(math.isfinite, losses)), f"losses {losses}")
    return "six steps, finite losses"


@fault(26, "every completion is truncated and masked", "have a loss of 0", trl="0")
def _(world: World) -> str:
    world.recipe(filters=[{"use": "overlong"}], rollout={**RECIPE["rollout"], "max_new_tokens": 1})
    world.train().well()
    losses = world.logged("loss")
    expect(losses == [0.0] * 6, f"losses {losses}")
    expect(world.weights() == world.weights("model"), "the weights moved")
    return "losses 0, weights unchanged"
