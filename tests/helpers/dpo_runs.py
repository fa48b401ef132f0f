"""Small runs of trainer.dpo: rows, recipes over a tiny model, trainers in float64, and log-probs by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe
from hf_rlhf.conformance.offline_trainers import trainer_of
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.offline.setup import make_trainer
from tests.helpers import offline_runs as off

ROWS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    {"prompt": "12+9=", "chosen": "21", "rejected": "2"},
    {"prompt": "1?", "chosen": "so it is 17", "rejected": "so it is 4711"},
    {"prompt": "say: ", "chosen": "abc", "rejected": "z"},
]
"""Completions of unequal length; some begin alike, and one of them is the beginning of the other."""


def recipe(
    folder: Path, *words: str, name: str = "dpo", given: Sequence[dict[str, Any]] | None = None
) -> OfflineRecipe:
    """The packaged recipe over a tiny model in float64, six steps unless the words say otherwise."""
    if not (folder / "model").is_dir():
        off.save_model(folder / "model")
    data = off.write(folder / "rows.jsonl", off.rows("reward_model") if given is None else given)
    small = [f"model.path={folder / 'model'}", "model.dtype=float64", f"dataset.path={data}", "training.max_steps=6"]
    small += ["training.use_cpu=true", "training.per_device_train_batch_size=4", "training.learning_rate=0.01"]
    made = load_recipe(name, [*small, "training.warmup_steps=0", *words])
    assert isinstance(made, OfflineRecipe)
    return made


def run(folder: Path, *words: str, given: Any = None, resume: bool = False, out: str = "out", name: str = "dpo") -> Any:
    """The summary of a run in `folder / out`."""
    return train(recipe(folder, *words, name=name, given=given), str(folder / out), resume)


def made(folder: Path, *words: str, given: Any = ROWS) -> Any:
    """The trainer of the recipe, before its first step."""
    own = recipe(folder, "dataset.held_out=0", *words, given=given)
    return make_trainer(own, str(folder / "out"))


def small(folder: Path, rows: Sequence[Mapping[str, Any]] = ROWS, training: Any = None, **settings: Any) -> Any:
    """A trainer of these rows over the tiny policy in float64."""
    plugin = load_plugin("trainer", "dpo", **settings)
    return trainer_of(plugin, tiny_policy(dtype=torch.float64), rows, str(folder), **(training or {}))


def moved(trainer: Any, scale: float = 0.05) -> Any:
    """The same trainer, its policy's trained parameters moved at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter.dtype))
    return trainer


def batch_of(trainer: Any) -> dict[str, Tensor]:
    """All rows in one batch."""
    return trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))  # type: ignore[no-any-return]


def loss_and_gradient(trainer: Any, batch: Any = None) -> tuple[float, Tensor]:
    """The loss of a batch, all rows unless it is given, and its gradient in the policy's parameters."""
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer) if batch is None else batch)
    return loss.item(), gradient(trainer.model, loss)


def gradient(model: Any, loss: Tensor) -> Tensor:
    """Of a loss, in the trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained)
    return torch.cat([g.flatten() for g in found])


def logps(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """The sum of log-probs of the tokens behind the prompt, by the logits of one row without padding."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1]
    given = torch.tensor(list(ids)[1:])
    each = logits.log_softmax(-1).gather(1, given.unsqueeze(1)).squeeze(1)
    return each[max(len(prompt) - 1, 0) :].sum()


def by_hand(model: Any, trainer: Any, side: str) -> Tensor:
    """(B,) log-probs of the chosen or rejected completions under a model."""
    rows = trainer.train_dataset
    return torch.stack([logps(model, row["prompt_ids"], row[f"{side}_ids"]) for row in rows])


def lengths(trainer: Any, side: str) -> Tensor:
    """(B,) tokens of the completions."""
    rows = trainer.train_dataset
    return torch.tensor([len(row[f"{side}_ids"]) - len(row["prompt_ids"]) for row in rows]).double()
