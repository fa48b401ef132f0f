"""Rows 29 to 34: datasets that cannot be trained on."""

from __future__ import annotations

from benchmarks.faults.world import World, fault


@fault(29, "empty dataset", "refuse it", trl="has finished at step 0")
def _(world: World) -> str:
    world.rows([])
    return world.train().refused().line("has no rows")


@fault(30, "fewer rows than a rollout has prompts", "refuse it", trl="trains 0 steps, or an obscure error")
def _(world: World) -> str:
    world.rows([{"prompt": "1+1=", "answer": "2"}])
    return world.train().refused().line("error:", "rollout.prompts")


@fault(31, "prompts that are left over", "say how many an epoch leaves out", trl="leaves them out without a word")
def _(world: World) -> str:
    world.rows([{"prompt": f"{i}+{i}=", "answer": "2"} for i in range(5)])
    return (
        world.train("training.max_steps=-1", "training.num_train_epochs=2").well().line("leaves 1 of the 5 prompts out")
    )


@fault(32, "missing column", "refuse it before the model is loaded", trl="a KeyError at the first step")
def _(world: World) -> str:
    world.rows([{"question": "1+1=", "answer": "2"}] * 8)
    line = world.train().refused().line("prompt", "question")
    world.rows([{"prompt": "1+1=", "solution": "2"}] * 8)
    world.recipe(rewards=["exact_match"])
    world.train().refused().line("answer", "solution")
    return line


@fault(33, "empty or missing prompt", "name its row", trl="an IndexError in generate")
def _(world: World) -> str:
    line = ""
    for prompt in ("", None):
        world.rows([{"prompt": "1+1=", "answer": "2"}] * 5 + [{"prompt": prompt, "answer": "2"}] * 3)
        line = world.train().refused().line("row 6")
    return line


@fault(34, "prompt longer than the context", "refuse it or leave it out, by row", trl="trains on, without a word")
def _(world: World) -> str:
    world.rows([{"prompt": "1+1=" * (100 if i == 3 else 1), "answer": "2"} for i in range(8)])
    return world.train().refused().line("row 4")
