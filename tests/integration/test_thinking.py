"""Whole runs with Qwen3's chat template, which drops the thoughts of earlier turns: `history: as_rendered`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.axes import RolloutEngine
from hf_rlhf.batch import Completions, Prompt
from hf_rlhf.training.setup import AlgorithmError
from tests.helpers import runs
from tests.helpers.episodes import episode_tokenizer, user
from tests.helpers.models import tiny_llama

ROWS = [{"prompt": [user(f"{i}+1=")], "answer": str(i + 1)} for i in range(1, 7)]
EMPTY = "<think>\n\n</think>\n\n"


@dataclass(kw_only=True)
class Thinks(RolloutEngine):
    """Thinks before each answer; half of the answers of a prompt are right in the second turn."""

    name = "thinks"

    max_new_tokens: int = 64

    def __call__(
        self, policy: Any, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        texts = []
        for row, prompt in enumerate([prompt for prompt in prompts for _ in range(num_generations)]):
            second = policy.tokenizer.decode(prompt.ids).count("user") == 2
            said = prompt.columns["answer"] if second and row % 2 else "0"
            texts.append(f"<think>\nhm {row}\n</think>\n\n{said}<|im_end|>")
        ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return Completions(ids=ids, finish_reasons=["stop"] * len(ids))


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "thoughts": (Thinks(prompts=4, num_generations=4), {}),
    "no thoughts": ({**runs.SAMPLED, "max_new_tokens": 6}, {"enable_thinking": False}),
}


def trainer(folder: Path, way: str, history: str = "as_rendered", **settings: Any) -> Any:
    rollout, kwargs = WAYS[way]
    tokenizer = episode_tokenizer("qwen3", **kwargs)
    torch.manual_seed(0)
    play = {"use": "second_chance", "history": history, "max_tokens": 120, "says": "no"}
    return runs.trainer(
        folder,
        rollout=rollout,
        environment=[play],
        rewards=["episode"],
        kl=[{"use": "in_loss", "beta": 0.1}],
        reference="frozen",
        rollout_correction="truncated" if way == "no thoughts" else "none",
        model={"chat_template_kwargs": kwargs},
        policy=tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512),
        tokenizer=tokenizer,
        data=ROWS,
        training={"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **settings},
    )


@pytest.mark.parametrize("way", WAYS)
def test_each_turn_is_asked_with_what_the_template_writes_and_all_sampled_tokens_train(
    way: str, tmp_path: Path
) -> None:
    made = trainer(tmp_path, way)
    decode, buffer = made.processing_class.decode, made.collector.collect(0)
    thought = "hm" if way == "thoughts" else EMPTY
    second = [i for i, ends in enumerate(buffer.forks) if ends]
    assert second
    for i in second:
        ((start, context),) = buffer.forks[i]
        completion, prompt = buffer.completion_ids[i], decode(buffer.prompt_ids[i])
        assert thought in (decode(completion[:start]) if way == "thoughts" else prompt)
        read = decode(context).removesuffix(EMPTY)
        assert "think" not in read
        assert read.endswith("<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n")
        assert bool(buffer.rows["mask"][i, : len(completion)].all())
    made.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_learns_from_the_contexts_that_were_read_and_resumes_bit_identically(way: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path, way)
    start = runs.parameters(whole)
    whole.train()
    whole.close()
    found = [entry for entry in runs.entries(whole) if "rollout/rows" in entry]
    assert [entry["environment/forks/mean"] for entry in found] == [1, 1]
    if way == "no thoughts":
        assert max(entry["rollout/sampler_gap/max"] for entry in found) <= 2e-5
    else:
        assert not torch.equal(start, runs.parameters(whole))
    again = trainer(tmp_path, way)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again.close()
    assert torch.equal(runs.parameters(whole), runs.parameters(again))


def test_history_extend_refuses_the_template_and_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(AlgorithmError, match=r"environment\.0\.history=as_rendered"):
        trainer(tmp_path, "no thoughts", "extend")
